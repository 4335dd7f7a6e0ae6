"""`rwkv-es export`: a run's weights as a file that every RWKV program loads, laid out exactly like the base."""

import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from rwkv_es.config.options import PROVENANCE, Config
from rwkv_es.errors import CheckpointError, ConfigError
from rwkv_es.es.update import checksum
from rwkv_es.files import writing
from rwkv_es.model import checkpoint
from rwkv_es.model.int8 import moved
from rwkv_es.model.layout import STATE
from rwkv_es.model.tokenizer import json_beside
from rwkv_es.run.identity import read_config
from rwkv_es.run.ledger import best_weights, default_export
from rwkv_es.run.made import making
from rwkv_es.run.record import read_steps
from rwkv_es.run.snapshots import Snapshot, latest_snapshot, read_snapshot

_SUFFIXES = (".pth", ".safetensors")


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
    base = Path(options[PROVENANCE]["base"])
    out = Path(config.out) if config.out else default_export(run, base)
    is_own = out.absolute() == default_export(run, base).absolute()
    tokenizer = _tokenizer(options.get("tokenizer", "auto"), base)
    if not is_own:
        _refuse_replacing(out, tokenizer)
    _refuse_suffix(out)
    sha256 = options[PROVENANCE]["base_sha256"]
    snapshot = _choose(run, config.weights) or _before_training(base, sha256, options.get("state", ""))
    if snapshot.params["emb.weight"].dtype == torch.int8:
        _refuse_another_base(base, sha256, "the run's int8 weights are steps from")
    with making(run, _outputs(out)) if is_own else nullcontext():
        written = export_params(
            snapshot.params, base, out, tokenizer=tokenizer, was_rounded=options.get("dtype") != "fp32"
        )
    for path in written:
        print(f"wrote {path} (weights after {snapshot.step} steps)")
    return out


def export_params(
    params: checkpoint.Params, base: Path, out: Path, *, tokenizer: Path | None = None, was_rounded: bool = True
) -> list[Path]:
    """Write weights with exactly the base file's keys, order, shapes and dtypes. Returns the files written.

    An initial state that the base does not have goes to <out>-state.pth (fp32); a tokenizer JSON comes along as
    <out>.tokenizer.json. What has not moved leaves with the base's own bits, even where it was trained in bf16
    (`was_rounded`: it may have been).

    Raises:
        ConfigError: `out` is the base, has the wrong suffix, or cannot be written.
        CheckpointError: the weights do not fit the base.
    """
    _refuse_suffix(out)
    if out.resolve() == base.resolve():
        raise ConfigError(f"{out} is the base checkpoint, which stays as it is; choose another --out")
    weights, state = _as_base(params, base, was_rounded)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        written = _copy_tokenizer(tokenizer or _tokenizer("auto", base), out)
        if state:
            written.append(out.with_name(f"{out.stem}-state.pth"))
            checkpoint.save(written[-1], state)
        checkpoint.save(out, weights)
    return [out, *written]


def _outputs(out: Path) -> list[Path]:
    """Return what an export may write: the weights, the tokenizer, the initial state."""
    return [out, *(out.with_name(out.stem + end) for end in (".tokenizer.json", "-state.pth"))]


def _refuse_suffix(out: Path) -> None:
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"an exported file must end in {' or '.join(_SUFFIXES)}; got {str(out)!r}")


def _refuse_replacing(out: Path, tokenizer: Path | None) -> None:
    """Refuse to write over anything but the tokenizer that is written anyway."""
    for path in _outputs(out):
        is_same = path.exists() and tokenizer is not None and tokenizer.exists() and path.samefile(tokenizer)
        if os.path.lexists(path) and not is_same:
            raise ConfigError(f"{path} exists already; choose another --out, or remove it first")


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


def _as_base(params: checkpoint.Params, base: Path, was_rounded: bool) -> tuple[checkpoint.Params, checkpoint.Params]:
    """Split params into weights laid out like the base file, and an initial state that it does not have."""
    if not base.exists():
        print(f"rwkv-es: {base} is gone, so its dtypes are unknown: they are exported as trained", file=sys.stderr)
        layout = {name: tensor for name, tensor in params.items() if not STATE.fullmatch(name)}
    else:
        layout, _ = checkpoint.load(base)
    state = {name: params[name].float() for name in params if name not in layout and STATE.fullmatch(name)}
    if different := (set(params) - set(state)) ^ set(layout):
        raise CheckpointError(f"the trained weights and {base} differ in the tensors {', '.join(sorted(different))}")
    return {name: _fit(name, params[name], like, was_rounded) for name, like in layout.items()}, state


def _fit(name: str, trained: Tensor, like: Tensor, was_rounded: bool) -> Tensor:
    """Return a trained tensor in the base's dtype, rounded to from fp32; the base's own bits where nothing moved."""
    if trained.shape != like.shape:
        raise CheckpointError(f"{name} is {tuple(trained.shape)} in the run, but {tuple(like.shape)} in the base")
    if trained.dtype == torch.int8:
        fitted = moved(trained, like)
    else:
        fitted = trained.to("cpu", like.dtype)
        if was_rounded and like.dtype != torch.bfloat16:
            start = like.bfloat16().to(trained.dtype)
            fitted = torch.where(trained.cpu() == start, like, fitted)
    if not fitted.isfinite().all():
        raise CheckpointError(f"{name} is not finite in {like.dtype}; export an earlier snapshot, or train gentler")
    return fitted


def _copy_tokenizer(source: Path | None, out: Path) -> list[Path]:
    target = out.with_name(f"{out.stem}.tokenizer.json")
    if source is None or not source.exists():
        return []
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    return [target]
