"""A file's tensors, whatever model they are of: .pth and .safetensors, memory-mapped where that is possible."""

import mmap
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from rwkv_es.model.layout import Params
from rwkv_es.pretrained.formats import check_archive, kind_of
from rwkv_es.pretrained.header import check_names
from rwkv_es.system.errors import CheckpointError
from rwkv_es.system.texts import shown

_LATE_OPERAND = re.compile(r"Unsupported operand 1[45]\d\b")  # of the pickle protocols 4 and 5; torch reads 2 and 3
_DAMAGE: tuple[type[Exception], ...] = (  # what torch raises for broken files
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, struct.error),
    *(RuntimeError, OSError, EOFError, ImportError, MemoryError),
)
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory")
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python knows it from 3.13 on; Linux's value


def read_tensors(path: Path) -> Params:
    """Read the tensors of a file; nothing in it is run.

    Raises:
        CheckpointError: it is damaged, or holds something else than tensors of its own.
    """
    kind = kind_of(path)
    if kind != "safetensors":
        check_archive(path)
    content = _read_safetensors(path) if kind == "safetensors" else _read_pth(path)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a dict of tensors; give the state dict's file"
        )
    for name, value in content.items():
        if not isinstance(value, Tensor):
            held = ", ".join(shown(name).strip("'\"") for name in list(content)[:4])
            raise CheckpointError(
                f"{path} is no plain state dict: {shown(name)} is a {type(value).__name__} (it holds {held}, ...); "
                "save the model's state dict alone"
            )
    check_names(path, {str(name): value for name, value in content.items()})
    _check_plain(path, content)
    return {str(name): value.detach().resolve_neg() for name, value in content.items()}


def _check_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors without values of their own, and such that claim more values than the file holds."""
    total = 0
    for name, tensor in tensors.items():
        is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not is_dense or tensor.is_quantized or tensor.is_complex() or not tensor.numel():
            raise CheckpointError(f"{path}: {name} is empty or no plain tensor; store dense tensors with values")
        num_bytes = tensor.numel() * tensor.element_size()
        total += num_bytes
        if num_bytes > tensor.untyped_storage().nbytes() or total > 2 * path.stat().st_size:
            raise CheckpointError(f"{path}: {name} claims more values than the file holds; it is no plain state dict")


def _read_pth(path: Path) -> Any:
    try:
        return _load_pth(path)
    except UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error) or _is_late_pickle(path, error):
            raise CheckpointError(
                f"{path} is refused: it holds more than tensors, or hides what it holds, and could run code when it is "
                "loaded; save the state dict alone, in torch.save's own pickle protocol"
            ) from None
        raise CheckpointError(f"{path} is no torch file or is damaged; download it again") from None
    except _DAMAGE as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """Say why a reader has given up: torch's name for too little memory is that of anything else."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return CheckpointError(f"there is not enough memory to read {path}")
    return CheckpointError(f"{path} is truncated or damaged; download it again")


def _load_pth(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read is refused by the caller
            is_zip = zipfile.is_zipfile(path)
            if path.suffix != ".safetensors":  # by which torch would choose another reader
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            if is_zip:
                return _map_unreserved(path)
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "Cannot allocate memory" in str(error):
            return _map_unreserved(path)
        raise


def _is_late_pickle(path: Path, error: UnpicklingError) -> bool:
    """Say whether torch has met a protocol of pickle that it does not read, in a file that begins like a pickle or zip.

    Such a file may hold harmless tensors, but nothing shows it.
    """
    with path.open("rb") as file:
        return file.read(1) in (b"\x80", b"P") and bool(_LATE_OPERAND.search(str(error)))


def _map_unreserved(path: Path) -> Any:
    """Map a file that is larger than the memory which the system promises to one process.

    torch asks for memory for every page, though none is ever written. For the device "meta" it reads nothing, and notes
    where each tensor lies. What is no plain tensor stays as it is, for the caller to refuse.
    """
    with path.open("rb") as file:
        found = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(found, Mapping):
        return found
    try:
        with path.open("rb") as file:
            protection = mmap.PROT_READ | mmap.PROT_WRITE  # torch warns of memory that cannot be written
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _MAP_NORESERVE, prot=protection)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be mapped ({error.strerror}); allow the process more memory") from None
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    is_plain = {name: isinstance(like, Tensor) and like.layout == torch.strided for name, like in found.items()}
    return {name: _placed(path, whole, like) if is_plain[name] else like for name, like in found.items()}


def _placed(path: Path, whole: Tensor, like: Tensor) -> Tensor:
    """Return the tensor whose layout is `like` among all bytes of its file."""
    storage = like.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(f"{path} is too large for torch {torch.__version__} to map here; use a newer torch")
    flat = whole[start : start + storage.nbytes()].view(like.dtype)
    return flat.as_strided(like.size(), like.stride(), flat.storage_offset() + like.storage_offset())


def _read_safetensors(path: Path) -> Params:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError:
        raise CheckpointError(f"{path} is truncated or no safetensors file; download it again") from None
    except _DAMAGE as error:
        raise _unreadable(path, error) from None
