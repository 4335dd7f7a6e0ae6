"""Official RWKV-7 (x070) checkpoints: .pth or .safetensors <-> tensors by name; everything is inferred from them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from rwkv_es.model.layout import STATE, Arch, Params, check_shapes, infer, refuse_other_models
from rwkv_es.pretrained import huggingface
from rwkv_es.pretrained.header import resolve as resolve  # noqa: PLC0414 - callers know it by this module
from rwkv_es.pretrained.tensors import read_tensors
from rwkv_es.system.errors import CheckpointError
from rwkv_es.system.files import sync

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 1 << 22


def load(path: str | Path, may_be_int8: bool = False) -> tuple[Params, Arch]:
    """Read a checkpoint, memory-mapped if the format allows it; nothing in the file is run.

    A snapshot may hold matrices as int8, whose scales follow from the base (see `quantize`); a base may not.

    Raises:
        CheckpointError: the file is not a complete, finite RWKV-7 checkpoint; the message names the tensor.
    """
    path = Path(path)
    is_directory = huggingface.is_directory(path)
    tensors = read(path)
    refuse_other_models(path, tensors)
    arch = infer(path, tensors)
    check_shapes(path, tensors, arch)
    if is_directory:
        huggingface.check_sizes(path, arch)
    floats = {name: w for name, w in tensors.items() if not (may_be_int8 and w.dtype == torch.int8)}
    _check_dtypes(path, floats, may_be_fp32=is_directory)
    _check_finite(path, tensors)
    return tensors, arch


def read(path: Path) -> Params:
    """Read the tensors of a file or a Hugging Face directory in the official layout, whatever model they are of.

    Raises:
        CheckpointError: they cannot be read.
    """
    return _read_directory(path) if huggingface.is_directory(path) else read_tensors(path)


def _read_directory(folder: Path) -> Params:
    huggingface.read_config(folder)
    shards = {file: read_tensors(file) for file in huggingface.weight_files(folder)}
    params = {}
    for name, (file, there, official) in huggingface.in_official_layout(folder, shards).items():
        stored = shards[file][there]
        turned = stored.mT.contiguous() if official.is_transposed and stored.dim() == 2 else stored
        params[name] = turned.reshape(official.shape(tuple(stored.shape)))
    return params


def load_state(path: str | Path, arch: Arch) -> Params:
    """Read an initial-state file: nothing but blocks.{i}.att.time_state (H,K_h,K_h) of every layer, taken as it is.

    Raises:
        CheckpointError: it is unreadable, holds something else, or belongs to a model of different sizes.
    """
    path = Path(path)
    tensors = read_tensors(path)
    shape = (arch.n_head, arch.head_size, arch.head_size)
    expected = {f"blocks.{i}.att.time_state": shape for i in range(arch.n_layer)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
        raise CheckpointError(
            f"{path} is no initial state for this model: {name} is {found.get(name, 'missing')} and should be "
            f"{expected.get(name, 'absent')}; it must hold blocks.0..{arch.n_layer - 1}.att.time_state alone"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if not dtypes <= {*_DTYPES}:
        raise CheckpointError(f"{path} holds {', '.join(map(str, dtypes))}; an initial state is fp32, bf16 or fp16")
    _check_finite(path, tensors)
    return tensors


def save(path: str | Path, params: Params, check: Callable[[Path], None] | None = None) -> None:
    """Write tensors under their names, in their order; the file is there whole or not at all.

    check: looks at the file before it takes its place, and raises what keeps it from there.

    Raises:
        CheckpointError: the file cannot be written, and what was there before is untouched; or it is written, but its
            folder cannot be flushed to the disk.
    """
    path = Path(path)
    plain = {name: _plain(tensor) for name, tensor in params.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _readable_os_errors(f"cannot write {path}", "the old file, if any, is untouched"):
            _write(plain, partial, path.suffix)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        if check is not None:
            check(partial)
        with _readable_os_errors(f"cannot write {path}", "the old file, if any, is untouched"):
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()
    with _readable_os_errors(f"{path} is written, but its folder is not flushed", "a power cut may yet take it away"):
        sync(path.parent)


def sha256(path: str | Path) -> str:
    """Return the hex digest of a file; of a Hugging Face directory, that of the digests of its files of weights.

    Raises:
        CheckpointError: it cannot be read.
    """
    if huggingface.is_directory(Path(path)):
        digests = [f"{sha256(file)}  {file.name}\n" for file in huggingface.weight_files(Path(path))]
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror})") from None
    return digest.hexdigest()


def _check_dtypes(path: Path, tensors: Params, may_be_fp32: bool) -> None:
    """Refuse a file of several types; a Hugging Face directory may hold some tensors in fp32 beside shorter ones."""
    like = "emb.weight" if "emb.weight" in tensors else "ln_out.weight"
    dtype = tensors[like].dtype
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}; weights must be float32, bfloat16 or float16")
        is_alike = tensor.dtype == dtype or (may_be_fp32 and tensor.dtype == torch.float32)
        if not is_alike and not STATE.fullmatch(name):
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, but {like} is {dtype}; store all in one dtype")


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


def _untied(params: Params) -> Params:
    """Copy each tensor that shares its memory with one before it."""
    seen: set[int] = set()
    untied = {}
    for name, tensor in params.items():
        untied[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return untied


def _write(params: Params, path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        write_safetensors(_untied(params), path)  # the format has no two names for the same memory
    else:
        torch.save(params, path)


def write_safetensors(params: Params, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, in the library's words.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(params, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(0, str(error)) from None


@contextmanager
def _readable_os_errors(what: str, then: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{what} ({reason(error)}); {then}") from None


def reason(error: Exception) -> str:
    """Say why a file could not be written; torch speaks of positions in its archive."""
    said = str(error).strip().partition("\n")[0]
    is_cut = isinstance(error, RuntimeError) and "unexpected pos" in said
    cut = "not all of it found room: the disk is full, or the file larger than it may be"
    return getattr(error, "strerror", None) or (cut if is_cut else said.rpartition("strerror: ")[2])
