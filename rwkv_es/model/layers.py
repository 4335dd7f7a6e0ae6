"""What both fused engines hand to their kernels: a layer's parameters and factors, in the kernels' order."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_es.model import fp8
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params
from rwkv_es.model.weights import Factors

MATRICES = (
    *("att.receptance.weight", "att.key.weight", "att.value.weight", "att.output.weight"),
    *("att.w1", "att.a1", "att.v1", "att.g1", "att.w2", "att.a2", "att.v2", "att.g2"),
    *("ffn.key.weight", "ffn.value.weight"),
)
VECTORS = (
    *("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", *(f"att.x_{letter}" for letter in "rkvwag")),
    *("att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "att.r_k", "att.ln_x.weight", "att.ln_x.bias", "ffn.x_k"),
)
SLOW_START_S = 1.0
_OUTSIDE = ("emb.weight", "head.weight", "ln_out.weight", "ln_out.bias", "blocks.0.ln0.weight", "blocks.0.ln0.bias")


class LayerParams(NamedTuple):
    """A layer's parameters."""

    vectors: Tensor  # (19,C), in the order of VECTORS
    matrices: tuple[Tensor | None, ...]  # views as (in,out), in the order of MATRICES; None: not used


class Matrix(NamedTuple):
    """A matrix that rows are multiplied with: x (S,in) -> (S,out)."""

    values: Tensor  # (in,out), a view
    scale: Tensor | None  # (out,): of a matrix held as int8
    buffer: Tensor | None  # where it is turned into the dtype of x, one matrix at a time
    rounded: fp8.Rounded | None = None  # as (out,in): what is multiplied instead

    def times_(self, x: Tensor, out: Tensor) -> None:
        """Set out (S,out) to x @ values; 8 bits are exact in bf16, their scale comes after the sum."""
        if self.rounded is not None:
            fp8.times(x, self.rounded, out)
            return
        if self.scale is None or self.buffer is None:
            torch.mm(x, self.values, out=out)
            return
        turned = self.values.t()
        weight = self.buffer[: turned.numel()].view(turned.shape).copy_(turned)
        torch.mm(x, weight.t(), out=out).mul_(self.scale)

    def add_(self, x: Tensor, to: Tensor, free: Tensor) -> None:
        """Add x @ values to what is in `to` (S,out); free (S,out) may be overwritten."""
        if self.scale is None and self.rounded is None:
            torch.addmm(to, x, self.values, out=to)
        else:
            self.times_(x, free)
            to.add_(free)


def matrix_of(model: Model, name: str, values: Tensor, buffer: Tensor) -> Matrix:
    """Return a matrix of a layer, values (in,out), as rows are multiplied with it."""
    scale, is_large = model.scales.get(name), name.endswith(".weight")
    rounded = fp8.rounded(values.t()) if model.is_fp8 and is_large else None
    return Matrix(values, None if scale is None else scale.to(model.like.dtype), buffer, rounded)


class PackedFactors(NamedTuple):
    """A layer's factors of all directions, side by side in order of use; for M matrices."""

    block: Tensor | None  # (D,r,width) bf16; None: no matrix is a target
    place: list[int]  # (2*M,): where matrix m's input side starts, then the output sides; -1: no target
    scale: list[float]  # (M,)


def are_covered(factors: Factors | None, in_layers: Sequence[str]) -> bool:
    """Say whether kernels that perturb these tensors of a layer can apply all the perturbations."""
    targets = factors.scale if factors else ()
    return all(name in _OUTSIDE or name.endswith(("time_state", *in_layers)) for name in targets)


def layer_params(params: Params, i: int) -> LayerParams:
    """Collect the parameters of layer i."""
    block, unused = f"blocks.{i}.", ("att.v0", "att.v1", "att.v2") if i == 0 else ()
    like = params[block + "att.a0"].flatten()  # layer 0 has no value mix: anything of that shape
    vectors = torch.stack([like if name in unused else params[block + name].flatten() for name in VECTORS])
    found = {name: None if name in unused else params[block + name] for name in MATRICES}
    turned = (m.t() if m is not None and name.endswith(".weight") else m for name, m in found.items())
    return LayerParams(vectors, tuple(turned))


def pack(factors: Factors | None, i: int, multiple: int = 1) -> PackedFactors:
    """Lay the matrices' factors in layer i side by side, input side before output side, in the order of MATRICES.

    Every side starts at a multiple of `multiple` values.
    """
    place, scale = [-1] * (2 * len(MATRICES)), [0.0] * len(MATRICES)
    sides: list[Tensor] = []
    width = 0
    for m, matrix in enumerate(MATRICES):
        name = f"blocks.{i}.{matrix}"
        if factors is None or name not in factors.scale:
            continue
        pair = (factors.b[name], factors.a[name]) if name.endswith(".weight") else (factors.a[name], factors.b[name])
        scale[m] = factors.scale[name]
        for at, side in zip((m, len(MATRICES) + m), pair):
            place[at], gap = width, -side.shape[1] % multiple
            sides += [
                side.mT.bfloat16(),
                side.new_zeros(len(side), side.shape[2], gap, dtype=torch.bfloat16),
            ]  # (D,r,i)
            width += side.shape[1] + gap
    return PackedFactors(torch.cat(sides, 2) if sides else None, place, scale)


class PackedVectors(NamedTuple):
    """The noise of a layer's vectors, of all directions."""

    block: Tensor  # (D,n,C) bf16, of the n that are targets
    place: list[int]  # (19,): where each of VECTORS stands in the block; -1: no target
    scale: list[float]  # (19,): sigma * multiplier


def pack_vectors(model: Model, factors: Factors | None, i: int) -> PackedVectors:
    """Lay the noise of layer i's vectors side by side."""
    targets = factors.scale if factors else {}
    names = [f"blocks.{i}.{vector}" for vector in VECTORS]
    found = [name for name in names if name in targets]
    place = [found.index(name) if name in targets else -1 for name in names]
    scale = [targets.get(name, 0.0) for name in names]
    if factors is None or not found:
        return PackedVectors(model.like.new_zeros(1, 1, model.arch.n_embd, dtype=torch.bfloat16), place, scale)
    return PackedVectors(torch.stack([factors.a[name].flatten(1) for name in found], 1).bfloat16(), place, scale)


def share_block_(factors: Factors, i: int, packed: PackedFactors) -> None:
    """Make the factors of layer i's matrices, in place, views of the block they were packed into: held once."""
    assert packed.block is not None
    for m, matrix in enumerate(MATRICES):
        name = f"blocks.{i}.{matrix}"
        if name not in factors.scale:
            continue
        into, out = (factors.b, factors.a) if name.endswith(".weight") else (factors.a, factors.b)
        for side, start in ((into, packed.place[m]), (out, packed.place[len(MATRICES) + m])):
            side[name] = packed.block[:, :, start : start + side[name].shape[1]].mT


def half_widths(model: Model) -> list[int]:
    """Return the ranks of the low-rank pairs w, a, v, g: how wide a row is between their halves."""
    pairs = [model.params.get(f"blocks.{model.arch.n_layer - 1}.att.{letter}1") for letter in "wavg"]
    return [pair.shape[1] if pair is not None else model.arch.rank_a for pair in pairs]


@contextmanager
def announced(text: str, is_so: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say on stderr what is happening when it takes long, and `is_so`: kernels are compiled, once per machine."""
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(SLOW_START_S):
            if is_so():
                print(text, file=sys.stderr, flush=True)
                return

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
