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

SLOW_START_S = 1.0
_OUTSIDE = ("emb.weight", "head.weight", "ln_out.weight", "ln_out.bias", "blocks.0.ln0.weight", "blocks.0.ln0.bias")


class LayerParams(NamedTuple):
    """A layer's parameters."""

    norms: Tensor  # (4,C): ln1 and ln2, weight and bias
    mixes: Tensor  # (6,C): x_r x_k x_v x_w x_a x_g
    vectors: Tensor  # (8,C): w0 a0 v0 k_k k_a r_k, ln_x's weight and bias
    ffn_mix: Tensor  # (C,)
    matrices: tuple[Tensor | None, ...]  # views as (in,out), in the order asked for; None: not used


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


def are_covered(factors: Factors | None, matrices: Sequence[str]) -> bool:
    """Say whether kernels that know these matrices can apply the perturbations."""
    targets = factors.scale if factors else ()
    return all(name in _OUTSIDE or name.endswith(("time_state", *matrices)) for name in targets)


def layer_params(params: Params, i: int, matrices: Sequence[str]) -> LayerParams:
    """Collect the parameters of layer i."""
    block = f"blocks.{i}."

    def rows(*names: str) -> Tensor:
        return torch.stack([params[block + name].flatten() for name in names])

    value_mix = "att.v0" if i else "att.a0"  # layer 0 has no value mix: anything of that shape
    norms = rows("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
    vectors = rows("att.w0", "att.a0", value_mix, "att.k_k", "att.k_a", "att.r_k", "att.ln_x.weight", "att.ln_x.bias")
    unused = ("att.v1", "att.v2") if i == 0 else ()
    found = {name: None if name in unused else params[block + name] for name in matrices}
    turned = (m.t() if m is not None and name.endswith(".weight") else m for name, m in found.items())
    return LayerParams(norms, rows(*(f"att.x_{c}" for c in "rkvwag")), vectors, rows("ffn.x_k")[0], tuple(turned))


def pack(factors: Factors | None, i: int, matrices: Sequence[str], multiple: int = 1) -> PackedFactors:
    """Lay the factors of layer i side by side, input side before output side, in the order of the matrices.

    Every side starts at a multiple of `multiple` values.
    """
    place, scale = [-1] * (2 * len(matrices)), [0.0] * len(matrices)
    sides: list[Tensor] = []
    width = 0
    for m, matrix in enumerate(matrices):
        name = f"blocks.{i}.{matrix}"
        if factors is None or name not in factors.scale:
            continue
        pair = (factors.b[name], factors.a[name]) if name.endswith(".weight") else (factors.a[name], factors.b[name])
        scale[m] = factors.scale[name]
        for at, side in zip((m, len(matrices) + m), pair):
            place[at], gap = width, -side.shape[1] % multiple
            sides += [
                side.mT.bfloat16(),
                side.new_zeros(len(side), side.shape[2], gap, dtype=torch.bfloat16),
            ]  # (D,r,i)
            width += side.shape[1] + gap
    return PackedFactors(torch.cat(sides, 2) if sides else None, place, scale)


def share_block_(factors: Factors, i: int, matrices: Sequence[str], packed: PackedFactors) -> None:
    """Make the factors of layer i, in place, views of the block that they were packed into: they are held once."""
    assert packed.block is not None
    for m, matrix in enumerate(matrices):
        name = f"blocks.{i}.{matrix}"
        if name not in factors.scale:
            continue
        into, out = (factors.b, factors.a) if name.endswith(".weight") else (factors.a, factors.b)
        for side, start in ((into, packed.place[m]), (out, packed.place[len(matrices) + m])):
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
