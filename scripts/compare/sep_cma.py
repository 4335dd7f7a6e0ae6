"""Separable CMA-ES (Ros and Hansen, PPSN 2008) on all entries: `cma_es.py` with a diagonal covariance."""

from collections.abc import Mapping
from typing import Any

from rwkv_es.model.forward import Model

from . import cma_es
from .vectors import NORMS

GRID = [{"sigma": sigma, "head": 10} for sigma in (3e-3, 1e-2, 3e-2)]
GRID += [{"sigma": sigma, "head": 1} for sigma in (1e-2, 3e-2)]
GRID += [{"sigma": 1e-2, "head": 10, "prompts": 32}]
GRID += [{"sigma": sigma, "names": NORMS} for sigma in (0.03, 0.1)]
DEFAULTS: Mapping[str, Any] = {"population": 32, "prompts": 16, "diagonal": True}
State, ask, tell, params = cma_es.State, cma_es.ask, cma_es.tell, cma_es.params


def start(model: Model, settings: Mapping[str, Any], seed: int) -> cma_es.State:
    """Begin at the base."""
    return cma_es.start(model, {**DEFAULTS, **settings}, seed)
