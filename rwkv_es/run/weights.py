"""A run's folder in the place of a model: the weights it has to offer, and what reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_es.config.file import is_run_folder, load_file
from rwkv_es.config.options import OPTIONS, PROVENANCE
from rwkv_es.pretrained.tokenizer import json_beside
from rwkv_es.run.identity import read_config
from rwkv_es.run.ledger import best_weights, default_export
from rwkv_es.run.snapshots import snapshot_steps
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import expanded


def with_weights(values: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """Return a command's options with runs' weights in the place of their folders.

    A run that stands for the model brings its options along, except into another training.

    Raises:
        ConfigError: a run has no weights yet, or not in a form that the command takes.
    """
    found = dict(values)
    if is_run_folder(run := expanded(str(values.get("model", "")))):
        of_run = {} if verb == "train" else load_file(run)
        if values.keys() & {"task", "data"}:  # asked for instead of what the run was judged on
            of_run.pop("eval_sets", None)
        found = {**of_run, **values}
        found.update(weights_of(Path(run), values, takes_state="state" in OPTIONS[verb]))
    if is_run_folder(run := expanded(str(values.get("base", "")))):
        found["base"] = weights_of(Path(run), found, takes_state=False)["model"]
    return found


def weights_of(run: Path, options: Mapping[str, Any], takes_state: bool) -> dict[str, str]:
    """Return a run's model, tokenizer and initial state, as options: its export, else its best or last snapshot.

    A tokenizer or state that the options name is left alone.

    Raises:
        ConfigError: see `with_weights`.
    """
    config = read_config(run)
    base = Path(config[PROVENANCE]["base"])
    model = _weights(run, base, is_int8=config.get("quantize") == "int8")
    found = {"model": str(model)}
    if options.get("tokenizer", "auto") == "auto":
        found["tokenizer"] = _tokenizer(config.get("tokenizer", "auto"), base, model)
    state = model.with_name(f"{model.stem}-state.pth")
    if model.parent == run and state.is_file() and not options.get("state"):
        if not takes_state:
            raise ConfigError(
                f"{run} has tuned an initial state, which would be left out here; name the weights that hold it, "
                f"{_snapshot(run)}"
            )
        found["state"] = str(state)
    return found


def _tokenizer(option: str, base: Path, model: Path) -> str:
    """Return the tokenizer that a run was made with, or the copy beside its export."""
    if option == "auto":
        return str(json_beside(base) or option)
    copy = json_beside(model)
    return str(copy) if copy is not None and not Path(option).is_file() and option != "world" else option


def _weights(run: Path, base: Path, is_int8: bool) -> Path:
    exported = default_export(run, base)
    if exported.is_file():
        return exported
    known = best_weights(run)
    if known is not None and known.step == 0:
        return base
    if is_int8 and snapshot_steps(run):
        raise ConfigError(f"{run} has int8 snapshots only so far; make a model of them first: rwkv-es export {run}")
    return _snapshot(run)


def _snapshot(run: Path) -> Path:
    known, steps = best_weights(run), snapshot_steps(run)
    if not steps:
        raise ConfigError(f"{run} has no snapshot yet, so there is no model to load; train on, or name the base itself")
    return run / "snapshots" / f"step-{known.step if known and known.step else steps[-1]:06d}" / "model.pth"
