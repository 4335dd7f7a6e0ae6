"""A layer on a GPU: its products and kernels in their order, for one token a row or for several."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.gpu.operands import LayerNoise, LayerVectors, Texts, Work, layout_of
from rwkv_es.model.forward import Model, State
from rwkv_es.model.layers import MATRICES, layer_params, matrix_of, pack, share_block_
from rwkv_es.model.weights import Factors

_ALIGNED = 16  # values: factors are read 16 bytes at a time


class Layer(NamedTuple):
    """A layer's parameters in the kernels' order."""

    vectors: LayerVectors
    matrices: tuple[Any, ...]  # Matrix, in the order of MATRICES; None: not used
    is_first: bool


class Perturbation(NamedTuple):
    """A layer's factors of all directions (see `LayerNoise`)."""

    block: Tensor
    scale: Tensor
    layout: tuple[int, ...]


class Scratch(NamedTuple):
    """Buffers for S rows."""

    work: Work
    halves: tuple[Tensor, ...]  # between the pairs w a v g: (S,rank) each
    hidden: Tensor  # (S,F)
    coefficient: Tensor  # (S,NUM_MATRICES,r) fp32
    parts: Tensor  # (S,parts of F,r) fp32


@cache
def _import_kernels() -> tuple[Any, Any, Any, str]:
    """Import the kernels of one token, of several and of products when first needed; else say what is missing."""
    try:
        from rwkv_es.gpu import kernels, product_kernels, prompt_kernels
    except ImportError as error:
        return None, None, None, str(error)
    return kernels, prompt_kernels, product_kernels, ""


def kernels() -> Any:
    """Return the kernels; None: they are missing."""
    return _import_kernels()[0]


def what_is_missing() -> str:
    """Say why there are no kernels: Triton is not installed, or too old; "" if there are."""
    return _import_kernels()[-1]


def made(model: Model, i: int, buffer: Tensor) -> Layer:
    """Collect the parameters of layer i; int8 matrices are turned back in the buffer, one at a time."""
    vectors, matrices = layer_params(model.params, i)
    found = (None if m is None else matrix_of(model, f"blocks.{i}.{n}", m, buffer) for n, m in zip(MATRICES, matrices))
    return Layer(LayerVectors(*vectors.split((4, 6, 8, 1))), tuple(found), i == 0)


def packed(model: Model, factors: Factors | None, i: int) -> Perturbation:
    """Lay a layer's factors side by side. In bf16 they are then held once: `factors` become views."""
    device, found = model.like.device, pack(factors, i, _ALIGNED)
    if factors is None or found.block is None:
        nothing = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device=device)
        return Perturbation(nothing, torch.zeros(len(MATRICES), device=device), layout_of(1, 1, found.place))
    if model.like.dtype == torch.bfloat16:
        share_block_(factors, i, found)
    layout = layout_of(found.block.shape[1], found.block.shape[2], found.place)
    return Perturbation(found.block, torch.tensor(found.scale, device=device), layout)


def read_token_(x: Tensor, state: State, layer: Layer, noise: LayerNoise, scratch: Scratch) -> None:
    """Let every row go through a layer, in place: x (S,C), and the layer's part of the state, of S rows."""
    run, mixed = kernels(), scratch.work.mixed
    run.norm_and_mix(x, state.att_shift, layer.vectors, mixed, noise)
    _project_(layer, noise, scratch)
    run.update_state(state.wkv, scratch.work, layer.vectors, layer.is_first, noise)
    layer.matrices[3].add_(mixed[0], x, mixed[1])
    run.norm_and_shift(x, state.ffn_shift, layer.vectors, mixed[0], noise)
    _channel_mix_(x, (mixed[0], mixed[1]), layer, noise, scratch)


def read_texts_(
    x: tuple[Tensor, Tensor], state: State, layer: Layer, read: tuple[Texts, LayerNoise], scratch: Scratch
) -> None:
    """Let every row's tokens go through a layer: x (R*T,C), which is lost, and its next value.

    In place: the layer's part of the state, of all S rows.
    """
    run, mixed, noise = _import_kernels()[1], scratch.work.mixed, read[1]
    run.norm_and_mix(x[0], state.att_shift, layer.vectors, mixed, read)
    _project_(layer, noise, scratch)
    run.update_state(state.wkv, scratch.work, layer.vectors, layer.is_first, read)
    layer.matrices[3].add_(mixed[0], x[0], mixed[1])
    run.norm_and_shift(x, state.ffn_shift, layer.vectors, mixed, read)
    _channel_mix_(x[1], (mixed[1], mixed[0]), layer, noise, scratch)


def _project_(layer: Layer, noise: LayerNoise, scratch: Scratch) -> None:
    """Make the products of a time mix, all but the output's."""
    m = layer.matrices
    for operand, matrix, product in zip(scratch.work.mixed[:3], m[:3], scratch.work.products):
        matrix.times_(operand, product)
    down = [None if matrix is None else matrix.values for matrix in m[4:8]]
    _import_kernels()[2].project_down(scratch.work.mixed, down, scratch.halves)
    kernels().activate_pairs(*scratch.halves, noise)
    for half, matrix, product in zip(scratch.halves, m[8:12], scratch.work.products[3:]):
        if matrix is not None:
            matrix.times_(half, product)


def _channel_mix_(x: Tensor, at: tuple[Tensor, Tensor], layer: Layer, noise: LayerNoise, scratch: Scratch) -> None:
    """Add the channel mix to x (S,C); at: its operand (S,C), and what may be overwritten."""
    run, (key, value) = kernels(), layer.matrices[12:]
    key.times_(at[0], scratch.hidden)
    run.square_relu(scratch.hidden, noise)
    value.add_(scratch.hidden, x, at[1])
    run.add_ffn_value(x, noise)
