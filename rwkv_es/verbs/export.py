"""`rwkv-es export`: a run's weights as a file that every RWKV program loads, laid out exactly like the base."""

import sys
from functools import partial
from pathlib import Path

import torch

from rwkv_es.config.options import PROVENANCE, Config
from rwkv_es.es.update import checksum
from rwkv_es.measure.card import publish
from rwkv_es.pretrained import checkpoint
from rwkv_es.pretrained.exported import (
    export_directory,
    export_params,
    files_of,
    refuse_replacing,
    refuse_suffix,
    refusing,
)
from rwkv_es.pretrained.tokenizer import json_beside
from rwkv_es.run.identity import ENGINE_DTYPE, read_config
from rwkv_es.run.ledger import best_weights, default_export
from rwkv_es.run.made import making
from rwkv_es.run.record import read_steps
from rwkv_es.run.snapshots import Snapshot, latest_snapshot, read_snapshot
from rwkv_es.system.errors import CheckpointError, ConfigError


def export(config: Config) -> Path:
    """Write the best or last weights of the run `config.run` to `config.out`. Returns the file.

    Raises:
        ConfigError: no run, no snapshot, or a file that must not be overwritten.
        CheckpointError: the snapshot cannot be read or does not fit the base.
    """
    if not config.run:
        raise ConfigError("export needs the folder of a run: rwkv-es export RUN")
    run = Path(config.run)
    options = read_config(run)
    made_with = options[PROVENANCE]
    base, sha256 = Path(made_with["base"]), made_with["base_sha256"]
    out = _out(config, default_export(run, base))
    is_own = out.absolute() == default_export(run, base).absolute()
    tokenizer = _tokenizer(options.get("tokenizer", "auto"), base)
    if config.format == "hf":
        refuse_replacing([out])
    elif not is_own:
        refuse_replacing(files_of(out, tokenizer))
    snapshot = _choose(run, config.weights) or _before_training(base, sha256, options.get("state", ""))
    if snapshot.params["emb.weight"].dtype == torch.int8:
        _refuse_another_base(base, sha256, "the run's int8 weights are steps from")
    was_rounded = made_with.get(ENGINE_DTYPE, "float32" if options.get("dtype") == "fp32" else "") != "float32"
    if config.format == "hf":
        written = export_directory(snapshot.params, base, out, tokenizer=tokenizer, was_rounded=was_rounded)
    else:
        replacing = partial(making, run) if is_own else refusing
        written = export_params(
            snapshot.params, base, out, tokenizer=tokenizer, was_rounded=was_rounded, replacing=replacing
        )
    for path in written:
        print(f"wrote {path} (weights after {snapshot.step} steps)")
    publish(config.push, run, written, snapshot.step)
    return out


def _out(config: Config, default: Path) -> Path:
    """Return where the export goes, in the form that is asked for."""
    if config.format == "hf" and not config.out:
        raise ConfigError("a Hugging Face directory needs a place: rwkv-es export RUN --format hf --out DIR")
    suffix = f".{config.format}" if config.format in ("pth", "safetensors") else ""
    out = Path(config.out) if config.out else default.with_suffix(suffix) if suffix else default
    if config.format != "hf":
        refuse_suffix(out)
    if suffix and out.suffix != suffix:
        raise ConfigError(f"--format {config.format} and --out {config.out} say different things; leave one out")
    return out


def _tokenizer(option: str, base: Path) -> Path | None:
    """Return the tokenizer JSON that a run was made with: the one that was named, or one beside the base."""
    if option not in ("auto", "world"):
        return Path(option)
    return json_beside(base) if option == "auto" else None


def _refuse_another_base(base: Path, sha256: str, what: str) -> None:
    if not base.exists() or checkpoint.sha256(base) != sha256:
        raise CheckpointError(f"{what} the base {base} of sha256 {sha256}; it is not there, restore it")


def _choose(run: Path, weights: str) -> Snapshot | None:
    """Return the best or last snapshot; None if the best weights are those before training."""
    known = best_weights(run)
    if weights == "best" and known is not None and known.step == 0:
        print(
            f"rwkv-es: no snapshot answered held-out problems better than the model before training (reward "
            f"{known.score:.3f}), so that is exported as it was; --weights last exports the last weights",
            file=sys.stderr,
        )
        return None
    if weights == "best" and known is not None:
        return _as_recorded(run, read_snapshot(run, known.step))
    if weights == "best":
        print("rwkv-es: no held-out evaluation in this run, so its last weights are exported", file=sys.stderr)
    snapshot = latest_snapshot(run)
    if snapshot is None:
        raise ConfigError(f"{run} has no readable snapshot yet; train on, or lower --snapshot-every")
    return _as_recorded(run, snapshot)


def _as_recorded(run: Path, snapshot: Snapshot) -> Snapshot:
    """Return a snapshot whose weights are those that the ledger has recorded.

    Raises:
        CheckpointError: they are others.
    """
    recorded = {step.step + 1: step.checksum for step in read_steps(run)}.get(snapshot.step)
    if recorded is not None and checksum(snapshot.params) != recorded:
        raise CheckpointError(
            f"the snapshot of step {snapshot.step} in {run} has other weights than the ledger says; remove it, and "
            "rwkv-es resume builds it again"
        )
    return snapshot


def _before_training(base: Path, sha256: str, state: str) -> Snapshot:
    _refuse_another_base(base, sha256, "the run's best weights are those of")
    params, arch = checkpoint.load(base)
    return Snapshot(0, {**params, **(checkpoint.load_state(state, arch) if state else {})}, {})
