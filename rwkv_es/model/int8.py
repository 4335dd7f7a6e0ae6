"""int8 weights: `W = values * scale`, one scale per row (output channel), fixed by the base; steps go onto that grid.

The large matrices are held so: the blocks' Linear weights, the embedding and the head. Vectors and the low-rank
parameters stay as they are. A matrix is turned back into numbers of the engine's dtype one block of rows at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_es.noise.factors import gpu_kernels, philox

try:
    from rwkv_es.noise.rounding import move_on_grid
except ImportError:  # numba is missing or does not fit the installed numpy
    move_on_grid = None

LEVELS = 127  # of either sign
_ROW_MULTIPLE = 8  # blocks of rows are multiples of this, so that products and noise meet the same borders
_CHUNK = 1 << 20
_PRODUCT_BLOCK = {"cpu": 1 << 19}  # entries that stay in the cache between their conversion and their product
_LARGE_BLOCK = 1 << 24


class Quantized(NamedTuple):
    """A matrix (o,i) as int8 values (o,i) and the fp32 step of each row's grid (o,)."""

    values: Tensor
    scale: Tensor


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor is one of the large matrices."""
    return len(shape) == 2 and name.endswith(".weight")


def row_blocks(shape: tuple[int, ...], num_entries: int) -> Iterator[slice]:
    """Cut a matrix (o,i) into blocks of rows of at most about `num_entries` entries, each a multiple of 8 rows."""
    rows = max(num_entries // max(shape[1], 1) // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def quantize(weight: Tensor, device: torch.device | str = "cpu") -> Quantized:
    """Round a matrix (o,i) to int8, on the device, symmetrically per row; the largest entry of a row becomes +-127.

    No more than a block of rows is ever held in fp32, so that `weight` may be larger than what memory is left.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), device=device)
    blocks = list(row_blocks(tuple(weight.shape), _CHUNK))
    for rows in blocks:
        scale[rows] = weight[rows].to(device).float().abs().amax(1) / LEVELS
    is_empty = scale == 0  # a row of zeros gets a grid like the others', so that it can learn
    scale[is_empty] = 1 / LEVELS if is_empty.all() else scale[~is_empty].mean()
    for rows in blocks:
        values[rows] = on_grid(weight[rows].to(device), scale[rows])
    return Quantized(values, scale)


def on_grid(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the int8 values (o,i) nearest to weight (o,i) on the grids of scale (o,)."""
    return (weight / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def linear(x: Tensor, matrix: Quantized) -> Tensor:
    """Return `x @ W.T`: x (S,i) -> (S,o), in the dtype of x. Beside the result, one block of rows of W is held."""
    num_out, num_in = matrix.values.shape
    y = x.new_empty(len(x), num_out)
    blocks = product_blocks(matrix.values)
    buffer = x.new_empty(blocks[0].stop, num_in)
    for rows in blocks:
        block = buffer[: rows.stop - rows.start].copy_(matrix.values[rows])  # exact: 8 bits fit bf16
        torch.mm(x, block.t(), out=y[:, rows])
    return y.mul_(matrix.scale.to(x.dtype))


def product_blocks(weight: Tensor) -> list[slice]:
    """Cut a matrix (o,i) into blocks of rows that are converted to another dtype one at a time."""
    return list(row_blocks((len(weight), weight.shape[1]), _PRODUCT_BLOCK.get(weight.device.type, _LARGE_BLOCK)))


def embed(tokens: Tensor, matrix: Quantized, dtype: torch.dtype) -> Tensor:
    """Return the rows of the matrix that tokens (S,) name: (S,i) in `dtype`."""
    return (matrix.values[tokens].float() * matrix.scale[tokens, None]).to(dtype)


def move(values: Tensor, steps: Tensor, key: tuple[int, int], step: int, first: int = 0) -> None:
    """Add steps, in units of the grid, to int8 values in place, rounded up with a probability equal to the remainder.

    values (...) int8, steps (...) fp32, both contiguous; what would leave +-127 stays there. Noise comes from the
    counters (entry, step), where the first entry is number `first`, a multiple of 4. Right on average down to steps of
    2**-32 of the grid.
    """
    values, steps = values.view(-1), steps.view(-1)
    if move_on_grid is not None and values.device.type == "cpu":
        move_on_grid(values.numpy(), steps.numpy(), first, step, np.array(key, np.uint64))
        return
    if (kernels := gpu_kernels(values.device)) is not None:
        kernels.move_on_grid(values, steps, first, step, key)
        return
    for start in range(0, len(values), _CHUNK):
        part, t = values[start : start + _CHUNK], steps[start : start + _CHUNK].double()
        whole = t.abs().floor()
        is_up = _random_words(first + start, len(part), key, t.new_tensor(step, dtype=torch.int64)) < (
            (t.abs() - whole) * 2**32
        )
        moved = part + t.sign() * (whole + is_up)
        part.copy_(moved.clamp_(-LEVELS, LEVELS))


def _random_words(start: int, count: int, key: tuple[int, int], step: Tensor) -> Tensor:
    """Return (count,) float64 whole numbers below 2**32 for the entries from `start` (a multiple of 4) on."""
    blocks = torch.arange(start // 4, (start + count + 3) // 4, device=step.device)
    counter = torch.stack((blocks & 0xFFFFFFFF, blocks >> 32, step.expand_as(blocks), torch.zeros_like(blocks)), -1)
    return philox(counter, key).flatten()[:count].double()


def moved(values: Tensor, base: Tensor) -> Tensor:
    """Return the base (o,i), moved as far as its int8 values have been: an entry that did not move is the base's own.

    values (o,i) int8 of the trained matrix -> (o,i) in the dtype of the base. What rounding to int8 took from the base
    is given back.
    """
    start = quantize(base)
    after = torch.empty_like(base)
    for rows in row_blocks(tuple(base.shape), _CHUNK):
        distance = values[rows].float() - start.values[rows].float()
        there = (base[rows].float() + distance * start.scale[rows, None]).to(base.dtype)
        after[rows] = torch.where(distance == 0, base[rows], there)  # -0.0 + 0.0 would be 0.0
    return after
