"""The weights as every row sees them: shared tensors, and each row's own low-rank perturbation of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rwkv_es.model import fp8, int8
from rwkv_es.model.layout import Params
from rwkv_es.noise.lowrank import HAS_OUT_DTYPE, low_rank


class Factors(NamedTuple):
    """All members' factors of one step: drawn once, read at every token."""

    first: int  # the direction at place 0
    a: dict[str, Tensor]  # name -> (D,*batch,p,r)
    b: dict[str, Tensor]  # name -> (D,*batch,q,r)
    scale: dict[str, float]

    @property
    def num_directions(self) -> int:
        """D."""
        return len(next(iter(self.a.values()), ()))


class Members(NamedTuple):
    """Who answers, and under which noise."""

    ids: Sequence[int]  # members 2j and 2j+1 are the mirrored pair of direction j; -1: the unperturbed model
    step: int = 0
    factors: Factors | None = None  # of these members' directions


BASE = Members((-1,))  # the weights as they are


class Weights(NamedTuple):
    """The weights as S rows see them: the shared tensors, and each row's own perturbation of the targets."""

    params: Params
    factors: Factors | None = None
    direction: Tensor | None = None  # (S,) int64: a row's place among the factors' directions
    sign: Tensor | None = None  # (S,): +1, -1, or 0 for a row under no perturbation
    scales: Mapping[str, Tensor] = {}  # of the matrices held as int8
    is_fp8: bool = False  # whether the blocks' matrices are multiplied in fp8

    def rows(self, rows: slice | Tensor) -> "Weights":
        """Return the weights as the chosen rows see them."""
        if self.direction is None or self.sign is None:
            return self
        return self._replace(direction=self.direction[rows], sign=self.sign[rows])

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Apply a Linear's weight (o,i): x (S,i) -> (S,o)."""
        return self.perturbed(product(x, self.params[name], self.scales.get(name), self.is_fp8), x, name)

    def logits(self, x: Tensor) -> Tensor:
        """Apply the LM head: x (S,C) -> (S,V) fp32."""
        name = "head.weight"
        return self.perturbed(precise_product(x, self.params[name], self.scales.get(name)), x, name)

    def perturbed(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        """Add each row's perturbation of a Linear's weight (o,i), where it is a target: y = x @ W.T (S,o) -> (S,o)."""
        return y + self._low_rank(x, name, transpose=False) if self._is_target(name) else y

    def project(self, x: Tensor, name: str) -> Tensor:
        """Apply a low-rank parameter (i,o), used as x @ w: x (S,i) -> (S,o)."""
        y = x @ self.params[name]
        return y + self._low_rank(x, name, transpose=True) if self._is_target(name) else y

    def vector(self, name: str) -> Tensor:
        """Return a vector parameter: (C,) shared by all rows, or (S,C) where it is a target."""
        shared = self.params[name].flatten()
        if self.factors is None or not self._is_target(name):
            return shared
        noise = self.factors.a[name][self.direction].flatten(1)  # (S,C)
        return shared + self._scale(name)[:, None] * noise

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the embedding: tokens (S,) int64 -> (S,C)."""
        name = "emb.weight"
        if name in self.scales:
            matrix = int8.Quantized(self.params[name], self.scales[name])
            x = int8.embed(tokens, matrix, self.params["ln_out.weight"].dtype)
        else:
            x = self.params[name][tokens]
        if self.factors is None or not self._is_target(name):
            return x
        a = self.factors.a[name][self.direction, tokens] * self._scale(name)[:, None]  # (S,r)
        return x + torch.bmm(a.unsqueeze(1), self.factors.b[name][self.direction].mT).squeeze(1)

    def initial_wkv(self, layer: int) -> Tensor | None:
        """Return the tuned initial state of a layer, (H,K_h,K_h) or (S,H,K_h,K_h) fp32 as [value, key]; None: zero."""
        name = f"blocks.{layer}.att.time_state"
        if name not in self.params:
            return None
        shared = self.params[name].float()
        if self.factors is None or not self._is_target(name):
            return shared
        a, b = (f[name][self.direction].float() for f in (self.factors.a, self.factors.b))  # (S,H,K_h,r)
        return shared + self._scale(name).float()[:, None, None, None] * (a @ b.mT)

    def _is_target(self, name: str) -> bool:
        return self.factors is not None and name in self.factors.scale

    def _scale(self, name: str) -> Tensor:
        assert self.factors is not None and self.sign is not None
        return self.sign * self.factors.scale[name]

    def _low_rank(self, x: Tensor, name: str, transpose: bool) -> Tensor:
        assert self.factors is not None and self.direction is not None
        a, b = self.factors.a[name], self.factors.b[name]
        if transpose:
            a, b = b, a
        return low_rank(x, a, b, self.direction, self._scale(name))


def product(x: Tensor, weight: Tensor, scale: Tensor | None, is_fp8: bool = False) -> Tensor:
    """Return `x @ W.T`: x (S,i), weight (o,i) -> (S,o); a weight held as int8 comes with its scale (o,)."""
    if is_fp8:
        return fp8.times(x, fp8.rounded(weight))
    return functional.linear(x, weight) if scale is None else int8.linear(x, int8.Quantized(weight, scale))


def precise_product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return `x @ W.T` in fp32, never rounded to less: x (S,i), weight (o,i) -> (S,o).

    Logits of bf16 would be multiples of 1/8 between 16 and 32: ties, and other likeliest tokens.
    """
    if scale is None and x.dtype == torch.float32:
        return functional.linear(x, weight)
    is_own_dtype = x.is_cuda and HAS_OUT_DTYPE and x.dtype != torch.float32
    if scale is None and is_own_dtype:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    y = torch.empty(len(x), len(weight), device=x.device)
    for rows in int8.product_blocks(weight):
        if is_own_dtype:  # 8 bits are exact in bf16
            y[:, rows] = torch.mm(x, weight[rows].to(x.dtype).t(), out_dtype=torch.float32)
        else:
            torch.mm(x.float(), weight[rows].float().t(), out=y[:, rows])
    return y if scale is None else y.mul_(scale)
