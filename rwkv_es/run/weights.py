"""A run's folder in the place of a model: the weights it has to offer, and what reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_es.config.options import PROVENANCE
from rwkv_es.errors import ConfigError
from rwkv_es.model.tokenizer import json_beside
from rwkv_es.run.identity import read_config
from rwkv_es.run.ledger import best_weights, default_export
from rwkv_es.run.snapshots import snapshot_steps


def weights_of(run: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model and tokenizer of a run: its export, else its best snapshot so far, else its last one.

    Raises:
        ConfigError: the run has no weights yet.
    """
    base = Path(read_config(run)[PROVENANCE]["base"])
    found: dict[str, Any] = {"model": str(_weights(run, base))}
    tokenizer = json_beside(base) if options.get("tokenizer", "auto") == "auto" else None
    if tokenizer is not None:
        found["tokenizer"] = str(tokenizer)
    return found


def _weights(run: Path, base: Path) -> Path:
    exported = default_export(run, base)
    if exported.is_file():
        return exported
    known, steps = best_weights(run), snapshot_steps(run)
    if known is not None and known.step == 0:
        return base
    if not steps:
        raise ConfigError(f"{run} has no snapshot yet, so there is no model to load; train on, or name the base itself")
    return run / "snapshots" / f"step-{known.step if known else steps[-1]:06d}" / "model.pth"
