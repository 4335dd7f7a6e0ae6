"""What the GPU's kernels are handed, and in which order. Without Triton."""

from typing import NamedTuple

from torch import Tensor

Layout = tuple[int, ...]  # rank, width of the block, then of every matrix where its input sides start, then its outputs


class LayerNoise(NamedTuple):
    """A layer's perturbations, as its kernels read them."""

    block: Tensor  # (D,r,width) bf16 or fp32: every direction's factors, side by side in order of use
    scale: Tensor  # (NUM_MATRICES,) fp32: sigma * multiplier / sqrt(r)
    direction: Tensor  # (S,) int64: each row's place in the block
    sign: Tensor  # (S,)
    live: Tensor  # (S,) int32: 0: the row is left as it is
    coefficient: Tensor  # (S,NUM_MATRICES,r) fp32: carries scale * sign * (x @ B) from the input to the output side
    parts: Tensor  # (S,parts_of(F),r) fp32: the same of the channel mix's value matrix, in parts to be added
    layout: Layout


class LayerVectors(NamedTuple):
    """A layer's parameters that are no matrices."""

    norms: Tensor  # (4,C): ln1 and ln2, weight and bias
    mixes: Tensor  # (6,C): x_r x_k x_v x_w x_a x_g
    vectors: Tensor  # (8,C): w0 a0 v0 k_k k_a r_k, ln_x's weight and bias
    ffn_mix: Tensor  # (1,C)


class Work(NamedTuple):
    """The rows' values on their way through a time mix."""

    mixed: Tensor  # (6,S,C): the operands of r k v w a g; later y in [0]
    products: Tensor  # (7,S,C): r k v, then the pairs' w a v g
    v_first: Tensor  # (S,C): layer 0's value


class Texts(NamedTuple):
    """Which R rows read several tokens each; a row's tokens stand side by side, T for every row."""

    slot: Tensor  # (R,) int64: where the row's state is
    length: Tensor  # (R,) int32: how many it reads; 0: nobody is there


class Reading(NamedTuple):
    """Texts, and of each of their tokens what a layer's rows have."""

    texts: Texts
    tokens: Tensor  # (R*T,) int64
    direction: Tensor  # (R*T,) int64
    sign: Tensor  # (R*T,)
    live: Tensor  # (R*T,) int32: 0: no token is there


def layout_of(rank: int, width: int, place: list[int]) -> Layout:
    """Return what is compiled in: place (2*NUM_MATRICES,) as in `layers.PackedFactors`. Rank 0: nothing is a target."""
    return rank if max(place) >= 0 else 0, width, *place
