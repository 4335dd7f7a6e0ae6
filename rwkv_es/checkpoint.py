"""Official RWKV-7 (x070) checkpoints: .pth or .safetensors <-> tensors by name; everything is inferred from them."""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rwkv_es.errors import CheckpointError
from rwkv_es.layout import STATE, Arch, Params, check_shapes, infer, refuse_other_models

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 1 << 22
_EMBEDDED = Path(__file__).parent / "tiny" / "rwkv7-tiny.pth"


def resolve(model: str) -> Path:
    """Return the file that a model name means: "tiny" is the embedded one; ".pth" may be left out.

    Raises:
        CheckpointError: there is no such file.
    """
    if model == "tiny":
        return _EMBEDDED
    for path in (model, model + ".pth"):
        if os.path.isfile(path):
            return Path(path)
    what = "is a folder" if os.path.isdir(model) else "does not exist"
    raise CheckpointError(f'model {model!r} {what}; give a .pth or .safetensors file, or "tiny" for the embedded model')


def load(path: str | Path) -> tuple[Params, Arch]:
    """Read a checkpoint, memory-mapped where the format allows it; nothing in the file is run.

    Raises:
        CheckpointError: the file is not a complete, finite RWKV-7 checkpoint; the message names the tensor.
    """
    path = Path(path)
    tensors = _read(path)
    refuse_other_models(path, tensors)
    arch = infer(path, tensors)
    check_shapes(path, tensors, arch)
    _check_dtypes(path, tensors)
    _check_finite(path, tensors)
    return tensors, arch


def save(path: str | Path, params: Params) -> None:
    """Write tensors under their names, in their order; the file is there whole or not at all.

    Raises:
        CheckpointError: the file cannot be written; what was there before is untouched.
    """
    path = Path(path)
    plain = {name: _plain(tensor) for name, tensor in params.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _readable_os_errors(path):
            _write(plain, partial, path.suffix)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


def sha256(path: str | Path) -> str:
    """Return the hex digest of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})") from None
    return digest.hexdigest()


def _read(path: Path) -> Params:
    """Read the tensors of a file, whatever model they are of."""
    _check_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of tensors; give the state dict's file"
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            held = ", ".join(map(str, list(content)[:4]))
            raise CheckpointError(
                f"{path} is no plain state dict: {name!r} is a {type(value).__name__} (it holds {held}, ...); "
                "save the model's state dict alone"
            )
    return {str(name): value.detach() for name, value in content.items()}


def _check_file(path: Path) -> None:
    """Refuse what no reader could make sense of."""
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no regular file"
        raise CheckpointError(f"{path} is {what}; give a .pth or .safetensors file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a .pth or .safetensors file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({getattr(error, 'strerror', error)})") from None
    if not start:
        raise CheckpointError(f"{path} is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the model; fetch the real file with `git lfs pull`")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not a model; download the file itself")


def _read_pth(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read is refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} is refused: it holds more than tensors and could run code when it is loaded; "
                "save the state dict alone"
            ) from None
        raise CheckpointError(f"{path} is no torch file or is damaged; download it again") from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, AttributeError, TypeError, ImportError):
        raise CheckpointError(f"{path} is truncated or damaged; download it again") from None


def _read_safetensors(path: Path) -> Params:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise CheckpointError(f"{path} is truncated or no safetensors file; download it again") from None


def _check_dtypes(path: Path, tensors: Params) -> None:
    dtype = tensors["emb.weight"].dtype
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.numel():
            raise CheckpointError(f"{path}: {name} is empty or no plain tensor; store dense tensors with values")
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; weights must be float32, bfloat16 or float16")
        if tensor.dtype != dtype and not STATE.fullmatch(name):
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}, but emb.weight is {dtype}; store all in one dtype"
            )


def _check_finite(path: Path, tensors: Params) -> None:
    for name, tensor in tensors.items():
        for chunk in tensor.flatten().split(_CHUNK):
            # One pass that reads and adds nothing up: the extremes are finite if and only if all values are.
            if not torch.isfinite(torch.stack(chunk.aminmax())).all():
                raise CheckpointError(f"{path}: {name} has values that are not finite; the model is damaged")


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous CPU tensor whose storage holds nothing else."""
    plain = tensor.detach().cpu().contiguous()
    is_whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if is_whole else plain.clone()


def _write(params: Params, path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(params, path)
        except SafetensorError as error:
            raise OSError(0, str(error)) from None
    else:
        torch.save(params, path)


@contextmanager
def _readable_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror}); the old file, if any, is untouched") from None
    except RuntimeError as error:  # torch's name for a full disk
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot write {path} ({reason}); the old file, if any, is untouched") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
