"""The perturbed product and its adjoint, side by side: the method is right only while they agree.

Both are linear in the same dW_j = A_j @ B_j.T; `low_rank` applies it, `weighted_sum` collects it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

HAS_OUT_DTYPE = "out_dtype" in (torch.mm.__doc__ or "")  # since torch 2.8 or so, on GPUs


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


def weighted_sum_in_parts(a: Tensor, b: Tensor, fitness: Tensor) -> Tensor:
    """Return the same by two products of bf16 numbers that are summed in fp32, as a GPU does at its full speed.

    a (D,p,r) and b (D,q,r) bf16, fitness (D,) fp32 -> (p,q) fp32. A and B are exact in bf16; fitness times A is cut
    into two bf16 numbers, which keep 16 of its 24 bits.
    """
    weighted = _join(a.float() * fitness[:, None, None])
    high = weighted.bfloat16()
    right = _join(b).mT
    return _precise(high, right).add_(_precise((weighted - high).bfloat16(), right))


def _precise(x: Tensor, y: Tensor) -> Tensor:
    """Return the product of bf16 numbers, which are exact in fp32, summed in fp32: (p,k) @ (k,q)."""
    return torch.mm(x, y, out_dtype=torch.float32) if x.is_cuda and HAS_OUT_DTYPE else x.float() @ y.float()


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
