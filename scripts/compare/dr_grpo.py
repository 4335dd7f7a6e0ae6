"""Dr. GRPO (arXiv 2503.20783): `grpo.py` without the division by deviations and by lengths."""

from collections.abc import Mapping
from typing import Any

from rwkv_es.model.forward import Model

from . import grpo

GRID = grpo.GRID
DEFAULTS: Mapping[str, Any] = {**grpo.DEFAULTS, "dr": True, "longest": 64}
State, ask, tell, params = grpo.State, grpo.ask, grpo.tell, grpo.params


def start(model: Model, settings: Mapping[str, Any], seed: int) -> grpo.State:
    """Begin at the base."""
    return grpo.start(model, {**DEFAULTS, **settings}, seed)
