"""A checkpoint made ready for the engines: the tensors as in the file, and a copy in the engine's dtype and place."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_es.model import fp8
from rwkv_es.model.forward import Model
from rwkv_es.model.int8 import is_quantizable, quantize
from rwkv_es.pretrained.checkpoint import Arch, Params, load, load_state
from rwkv_es.pretrained.header import resolve
from rwkv_es.pretrained.tokenizer import Tokenizer, load_tokenizer
from rwkv_es.system.errors import ConfigError

_ROUNDED = (
    "rwkv-es: {} is in fp16 and is held in bf16 on a GPU, rounded from 11 bits to 8; --dtype fp32 keeps them all, in "
    "twice the memory"
)


class Loaded(NamedTuple):
    """A base checkpoint and the model made from it."""

    path: Path
    base: Params  # memory-mapped, as in the file, with the initial state if one was named
    model: Model  # a copy, to be changed in place


def load_model(
    path: str = "tiny",
    *,
    tokenizer: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "none",
    state: str = "",
) -> tuple[Model, Tokenizer]:
    """Load an official-layout RWKV-7 checkpoint (.pth or .safetensors) and its tokenizer.

    path: a file, or "tiny" for the embedded model. tokenizer: "world", a JSON file, or "auto": the one beside the
    model, or else World. dtype: "fp32", "bf16", or "auto": fp32 on a CPU, the file's elsewhere. quantize: "int8" for
    large matrices in 8 bits, "fp8" for the blocks' products in 8 bits. state: a file with an initial state.

    Raises:
        CheckpointError, ConfigError: a file is missing, damaged or of the wrong kind, or the device cannot be used.
    """
    loaded = load_base(path, dtype=dtype, device=device, quantize=quantize, state=state)
    return loaded.model, load_tokenizer(tokenizer, loaded.path, loaded.model.arch.n_vocab)


def load_base(name: str, *, dtype: str, device: str, quantize: str = "none", state: str = "") -> Loaded:
    """Load a base checkpoint and copy it for the engine.

    Raises:
        CheckpointError, ConfigError: see `load_model`.
    """
    place = _device(device)
    if place.type == "cuda":
        multiply_alike()
    path = resolve(name)
    base, arch = load(path)
    if state:
        base = {**base, **load_state(state, arch)}
    like = (place, _dtype(dtype, base["emb.weight"].dtype, place))
    if dtype == "auto" and place.type != "cpu" and base["emb.weight"].dtype == torch.float16:
        print(_ROUNDED.format(path), file=sys.stderr)
    if quantize == "fp8":
        fp8.refuse(*like)
    return Loaded(path, base, _engine_copy(base, arch, like, quantize)._replace(source=path))


def _engine_copy(base: Params, arch: Arch, like: tuple[torch.device, torch.dtype], in_8_bits: str) -> Model:
    """Copy the base tensor by tensor: what is held beside the copy is one tensor of the memory-mapped file."""
    params, scales = {}, {}
    for name, tensor in base.items():
        if in_8_bits == "int8" and is_quantizable(name, tuple(tensor.shape)):
            params[name], scales[name] = quantize(tensor, like[0])
        else:
            params[name] = tensor.to(*like, copy=True)
    return Model(params, arch, scales, is_fp8=in_8_bits == "fp8")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None


def multiply_alike() -> None:
    """Let a GPU add up every product in fp32 and in one piece, before the first of them.

    Otherwise sums for few rows may be split up and their parts added in bf16: other bits in other company.
    """
    is_split_known = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
    choice = (False, False) if is_split_known else False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = choice
    torch.backends.cuda.matmul.allow_tf32 = False


def _dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the engine's dtype: on a CPU fp32 unless bf16 is asked for; elsewhere the file's own, bf16 for fp16."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored
