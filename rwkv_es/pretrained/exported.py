"""Weights written exactly as a base file is laid out, with what belongs beside them."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from filecmp import cmp
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rwkv_es.model.int8 import moved
from rwkv_es.model.layout import STATE
from rwkv_es.pretrained import checkpoint
from rwkv_es.pretrained.directory import convert, take_tokenizer, write_like
from rwkv_es.pretrained.huggingface import is_directory
from rwkv_es.pretrained.tokenizer import json_beside
from rwkv_es.pretrained.written import check_written
from rwkv_es.system.errors import CheckpointError, ConfigError
from rwkv_es.system.files import sync, writing
from rwkv_es.system.streams import waiting

_SUFFIXES = (".pth", ".safetensors")
_TOKENIZER, _STATE = ".tokenizer.json", "-state.pth"  # ends of the names beside an export


@contextmanager
def refusing(files: Sequence[Path]) -> Iterator[None]:
    """Let files be written where nothing is."""
    refuse_replacing(files)
    yield


def export_params(
    params: checkpoint.Params,
    base: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    was_rounded: bool = True,
    replacing: Callable[[Sequence[Path]], AbstractContextManager[None]] = refusing,
) -> list[Path]:
    """Write weights with exactly the base file's keys, order, shapes and dtypes. Returns the files written.

    An initial state that the base does not have goes to <out>-state.pth (fp32); a tokenizer JSON comes along as
    <out>.tokenizer.json, unless it is there already. What has not moved leaves with the base's own bits, even where it
    was trained in bf16 (`was_rounded`: it may have been). `replacing` says which files may be there, before the work.

    What is written is read back before it takes its place, see `check_written`.

    Raises:
        ConfigError: `out` is the base, has the wrong suffix, cannot be written, or a file is there already.
        CheckpointError: the weights do not fit the base, or the file is not what it should be, and nothing of it stays.
    """
    refuse_suffix(out)
    if out.resolve() == base.resolve():
        raise ConfigError(f"{out} is the base checkpoint, which stays as it is; choose another --out")
    tokenizer = tokenizer or json_beside(base)
    layout, state_names = _layout(params, base)
    files = files_of(out, tokenizer, has_state=bool(state_names))
    with replacing(files), waiting(f"writing {out.name}"), writing(out):
        weights = {name: _fit(name, params[name], like, was_rounded) for name, like in layout.items()}
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(out, weights, partial(check_written, params=weights))
        if state_names:
            _save_state(_beside(out, _STATE), params, state_names)
        if tokenizer is not None and _beside(out, _TOKENIZER) in files:
            shutil.copyfile(tokenizer, _beside(out, _TOKENIZER))
    return files


def export_directory(
    params: checkpoint.Params, base: Path, out: Path, *, tokenizer: Path | None = None, was_rounded: bool = True
) -> list[Path]:
    """Write weights as a Hugging Face directory, in the base's dtypes. Returns the directory, and a state's file in it.

    From such a directory as base: its own names, shapes, shards and other files. From an official file: as the package
    rwkv7-hf converts it, with the code that transformers needs. Read back before it takes its place.

    Raises:
        ConfigError: `out` is there already, or rwkv7-hf is missing or fails.
        CheckpointError: see `export_params`.
    """
    refuse_replacing([out])
    tokenizer = tokenizer or json_beside(base)
    layout, state_names = _layout(params, base)
    state_names += [name for name in layout if STATE.fullmatch(name)]  # of a state tuned before: no directory holds one
    weights = {
        name: _fit(name, params[name], like, was_rounded) for name, like in layout.items() if name not in state_names
    }
    place = out.with_name(f".{out.name}.partial")
    with writing(out):
        shutil.rmtree(place, ignore_errors=True)  # what a crash has left
        place.mkdir(parents=True)
    try:
        with waiting(f"writing {out.name}"), writing(out):
            if is_directory(base):
                write_like(base, weights, place)
            else:
                convert(weights, place)
            if tokenizer is not None and tokenizer.parent != base:
                take_tokenizer(tokenizer, place)
        check_written(place, weights)
        if state_names:
            _save_state(place / "initial-state.pth", params, state_names)
        with writing(out):
            place.rename(out)
            sync(out.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return [out, out / "initial-state.pth"] if state_names else [out]


def _save_state(path: Path, params: checkpoint.Params, names: Sequence[str]) -> None:
    state = {name: params[name].float() for name in names}
    checkpoint.save(path, state, partial(check_written, params=state))


def _beside(out: Path, end: str) -> Path:
    return out.with_name(out.stem + end)


def files_of(out: Path, tokenizer: Path | None, has_state: bool = False) -> list[Path]:
    """Return what is going to be written: the weights, the tokenizer unless the same one is there, the state."""
    files, copy = [out], _beside(out, _TOKENIZER)
    if tokenizer is not None and tokenizer.exists() and not (copy.is_file() and cmp(copy, tokenizer, shallow=False)):
        files.append(copy)
    return [*files, _beside(out, _STATE)] if has_state else files


def refuse_suffix(out: Path) -> None:
    """Refuse a file's name that says nothing of its format.

    Raises:
        ConfigError: it is such a name.
    """
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"an exported file must end in {' or '.join(_SUFFIXES)}; got {str(out)!r}")


def refuse_replacing(files: Sequence[Path]) -> None:
    """Refuse to write over anything."""
    for path in files:
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists already; choose another --out, or remove it first")


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
