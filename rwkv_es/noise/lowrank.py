"""The perturbed product and its adjoint, side by side: the method is right only while they agree.

Both are linear in the same dW_j = A_j @ B_j.T; `low_rank` applies it, `weighted_sum` collects it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor


def low_rank(x: Tensor, a: Tensor, b: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Return `scale_s * x_s @ (A_j @ B_j.T).T` with j = index_s, never forming the matrix (EGGROLL, eq. 6).

    x (S,i), a (D,o,r), b (D,i,r), index (S,) int64, scale (S,) -> (S,o), in the dtype of x: what a row's perturbation
    adds to its product with a matrix (o,i).
    """
    coordinates = torch.bmm(x.unsqueeze(1), b[index]) * scale[:, None, None]  # (S,1,r)
    return torch.bmm(coordinates, a[index].mT).squeeze(1)  # (S,o)


def weighted_sum(a: Tensor, b: Tensor, fitness: Tensor) -> Tensor:
    """Return `sum_j fitness_j * A_j @ B_j.T` as one matrix product, with the same bits for any number of threads.

    a (D,*batch,p,r), b (D,*batch,q,r), fitness (D,) -> (*batch,p,q) in the dtype of a.
    """
    weighted = a * fitness.reshape(-1, *[1] * (a.dim() - 1))
    left, right = _join(weighted), _join(b)
    num_threads = torch.get_num_threads()
    if left.device.type != "cpu" or num_threads == 1:
        return left @ right.mT
    is_same = _is_same_with_one_thread(left.shape, right.shape, left.dtype, num_threads)
    with torch_threads(num_threads if is_same else 1):
        return left @ right.mT


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with some number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1024)
def _is_same_with_one_thread(left: torch.Size, right: torch.Size, dtype: torch.dtype, num_threads: int) -> bool:
    """Try whether this machine's product (*batch,p,k) @ (*batch,q,k).mT has the bits that one thread gives."""
    one, other = (torch.linspace(-1, 1, size.numel()).mul_(1000).sin_().to(dtype).view(size) for size in (left, right))
    products = []
    for count in (num_threads, 1):
        with torch_threads(count):
            products.append(one @ other.mT)
    return torch.equal(*products)


def _join(factor: Tensor) -> Tensor:
    """Lay all directions' columns side by side: (D,*batch,p,r) -> (*batch,p,D*r)."""
    return factor.movedim(0, -2).flatten(-2)
