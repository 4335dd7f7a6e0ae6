"""`rwkv-es export`: a run's weights as a file that every RWKV program loads, laid out exactly like the base."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from filecmp import cmp
from pathlib import Path

import torch
from torch import Tensor

from rwkv_es.config.options import PROVENANCE, Config
from rwkv_es.errors import CheckpointError, ConfigError
from rwkv_es.es.update import checksum
from rwkv_es.model.int8 import moved
from rwkv_es.model.layout import STATE
from rwkv_es.pretrained import checkpoint
from rwkv_es.pretrained.tokenizer import json_beside
from rwkv_es.run.identity import ENGINE_DTYPE, read_config
from rwkv_es.run.ledger import best_weights, default_export
from rwkv_es.run.made import making
from rwkv_es.run.record import read_steps
from rwkv_es.run.snapshots import Snapshot, latest_snapshot, read_snapshot
from rwkv_es.system.files import writing

_SUFFIXES = (".pth", ".safetensors")
_TOKENIZER, _STATE = ".tokenizer.json", "-state.pth"  # ends of the names beside an export


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
    out = Path(config.out) if config.out else default_export(run, base)
    is_own = out.absolute() == default_export(run, base).absolute()
    tokenizer = _tokenizer(options.get("tokenizer", "auto"), base)
    _refuse_suffix(out)
    if not is_own:
        _refuse_replacing(_files(out, tokenizer))
    snapshot = _choose(run, config.weights) or _before_training(base, sha256, options.get("state", ""))
    if snapshot.params["emb.weight"].dtype == torch.int8:
        _refuse_another_base(base, sha256, "the run's int8 weights are steps from")
    held = made_with.get(ENGINE_DTYPE) or ("float32" if options.get("dtype") == "fp32" else "")
    written = export_params(
        snapshot.params,
        base,
        out,
        tokenizer=tokenizer,
        was_rounded=held != "float32",
        replacing=(lambda files: making(run, files)) if is_own else _refusing,
    )
    for path in written:
        print(f"wrote {path} (weights after {snapshot.step} steps)")
    return out


@contextmanager
def _refusing(files: Sequence[Path]) -> Iterator[None]:
    """Let files be written where nothing is."""
    _refuse_replacing(files)
    yield


def export_params(
    params: checkpoint.Params,
    base: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    was_rounded: bool = True,
    replacing: Callable[[Sequence[Path]], AbstractContextManager[None]] = _refusing,
) -> list[Path]:
    """Write weights with exactly the base file's keys, order, shapes and dtypes. Returns the files written.

    An initial state that the base does not have goes to <out>-state.pth (fp32); a tokenizer JSON comes along as
    <out>.tokenizer.json, unless it is there already. What has not moved leaves with the base's own bits, even where it
    was trained in bf16 (`was_rounded`: it may have been). `replacing` says which files may be there, before the work.

    Raises:
        ConfigError: `out` is the base, has the wrong suffix, cannot be written, or a file is there already.
        CheckpointError: the weights do not fit the base.
    """
    _refuse_suffix(out)
    if out.resolve() == base.resolve():
        raise ConfigError(f"{out} is the base checkpoint, which stays as it is; choose another --out")
    tokenizer = tokenizer or _tokenizer("auto", base)
    layout, state_names = _layout(params, base)
    files = _files(out, tokenizer, has_state=bool(state_names))
    with replacing(files), writing(out):
        weights = {name: _fit(name, params[name], like, was_rounded) for name, like in layout.items()}
        out.parent.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and _beside(out, _TOKENIZER) in files:
            shutil.copyfile(tokenizer, _beside(out, _TOKENIZER))
        if state_names:
            checkpoint.save(_beside(out, _STATE), {name: params[name].float() for name in state_names})
        checkpoint.save(out, weights)
    return files


def _beside(out: Path, end: str) -> Path:
    return out.with_name(out.stem + end)


def _files(out: Path, tokenizer: Path | None, has_state: bool = False) -> list[Path]:
    """Return what is going to be written: the weights, the tokenizer unless the same one is there, the state."""
    files, copy = [out], _beside(out, _TOKENIZER)
    if tokenizer is not None and tokenizer.exists() and not (copy.is_file() and cmp(copy, tokenizer, shallow=False)):
        files.append(copy)
    return [*files, _beside(out, _STATE)] if has_state else files


def _refuse_suffix(out: Path) -> None:
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"an exported file must end in {' or '.join(_SUFFIXES)}; got {str(out)!r}")


def _refuse_replacing(files: Sequence[Path]) -> None:
    """Refuse to write over anything."""
    for path in files:
        if os.path.lexists(path):
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


def _layout(params: checkpoint.Params, base: Path) -> tuple[checkpoint.Params, list[str]]:
    """Return what the exported file has to look like, and the initial state's names if the base has none."""
    if not base.exists():
        print(f"rwkv-es: {base} is gone, so its dtypes are unknown: they are exported as trained", file=sys.stderr)
        layout = {name: tensor for name, tensor in params.items() if not STATE.fullmatch(name)}
    else:
        layout, _ = checkpoint.load(base)
    state = [name for name in params if name not in layout and STATE.fullmatch(name)]
    if different := (set(params) - set(state)) ^ set(layout):
        raise CheckpointError(f"the trained weights and {base} differ in the tensors {', '.join(sorted(different))}")
    return layout, state


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
