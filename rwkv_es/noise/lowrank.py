"""The perturbed product and its adjoint, side by side: the method is right only while they agree.

Both are linear in the same dW_j = A_j @ B_j.T; `perturbed_linear` applies it, `weighted_sum` collects it.
"""

import torch
from torch import Tensor


def perturbed_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, index: Tensor, scale: Tensor) -> Tensor:
    """Return `x_s @ (weight + scale_s * A_j @ B_j.T).T` with j = index_s, never forming the sum (EGGROLL, eq. 6).

    x (S,i), weight (o,i), a (D,o,r), b (D,i,r), index (S,) int64, scale (S,) -> (S,o), in the dtype of x.
    """
    return x @ weight.T + low_rank(x, a, b, index, scale)


def low_rank(x: Tensor, a: Tensor, b: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Return `scale_s * (x_s @ B_j) @ A_j.T`: the perturbation's part of `perturbed_linear`; same shapes."""
    coordinates = torch.bmm(x.unsqueeze(1), b[index]) * scale[:, None, None]  # (S,1,r)
    return torch.bmm(coordinates, a[index].mT).squeeze(1)  # (S,o)


def weighted_sum(a: Tensor, b: Tensor, fitness: Tensor) -> Tensor:
    """Return `sum_j fitness_j * A_j @ B_j.T` as one matrix product.

    a (D,*batch,p,r), b (D,*batch,q,r), fitness (D,) -> (*batch,p,q) in the dtype of a.
    """
    weighted = a * fitness.reshape(-1, *[1] * (a.dim() - 1))
    return _join(weighted) @ _join(b).mT


def _join(factor: Tensor) -> Tensor:
    """Lay all directions' columns side by side: (D,*batch,p,r) -> (*batch,p,D*r)."""
    return factor.movedim(0, -2).flatten(-2)
