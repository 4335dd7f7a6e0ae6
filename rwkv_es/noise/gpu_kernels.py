"""Noise and random rounding on a GPU (Triton), with the bits of the plain torch operations that they stand for.

`factors.table_values`, `update.round_stochastically` and `int8.move_` are the references.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS_PER_PROGRAM = 64


def fill_from_table(
    out: Tensor, first_block: int, directions: Tensor, counter: tuple[int, int, int], table: Tensor
) -> None:
    """Fill out (D,n): value v of row d is table[byte v % 16 of the block first_block + v // 16].

    A block's counter is (block, directions[d], step, 0). directions (D,) int64, counter: the step and the key's two
    words; table (256,) of the dtype of out.
    """
    num_values = out.shape[1]
    numbers = torch.tensor([*counter, first_block]).to(out.device, non_blocking=True)
    grid = (len(out), triton.cdiv(num_values, 16 * _BLOCKS_PER_PROGRAM))
    _fill_from_table[grid](out, (directions, numbers), table, num_values, BLOCKS=_BLOCKS_PER_PROGRAM)


def round_to_bf16(out: Tensor, values: Tensor, first: int, step: int, key: tuple[int, int]) -> None:
    """Fill out (n,) bf16 with neighbours of the fp32 values (n,); the first is entry `first`, a multiple of 8."""
    numbers = torch.tensor([step, *key, first // 8]).to(out.device, non_blocking=True)
    grid = (triton.cdiv(len(values), 8 * _BLOCKS_PER_PROGRAM),)
    of_bits = out.view(torch.int16), values.view(torch.int32)
    _round_to_bf16[grid](*of_bits, numbers, len(values), BLOCKS=_BLOCKS_PER_PROGRAM)


def move_on_grid(values: Tensor, steps: Tensor, first: int, step: int, key: tuple[int, int]) -> None:
    """Add steps (n,) fp32 to int8 values (n,) in place; the first is entry `first`, a multiple of 4."""
    numbers = torch.tensor([step, *key, first // 4]).to(values.device, non_blocking=True)
    grid = (triton.cdiv(len(values), 4 * _BLOCKS_PER_PROGRAM),)
    _move_on_grid[grid](values, steps, numbers, len(values), BLOCKS=_BLOCKS_PER_PROGRAM)


def round_to_fp8(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Fill values (n,i) fp8 and scale (n,) fp32 with what rows of x (n,i) are: see `fp8.rounded`."""
    tile = triton.next_power_of_2(x.shape[1])
    _round_to_fp8[(len(x),)](x, values, scale, x.shape[1], TILE=tile, num_warps=min(max(tile // 512, 1), 16))


@triton.jit
def _round_to_fp8(x, values, scale, width, TILE: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    read = tl.load(x + row * width + columns, mask=columns < width, other=0).to(tl.float32)
    size = tl.div_rn(tl.maximum(tl.max(tl.abs(read), 0), 1e-12), 448.0)
    tl.store(scale + row, size)
    tl.store(values + row * width + columns, tl.div_rn(read, size).to(tl.float8e4nv), mask=columns < width)


@triton.jit
def _words_of_entries(numbers, first, BLOCKS: tl.constexpr):
    """Return the four words (BLOCKS,1) of some blocks, whose counters are (block's low word, high word, step, 0)."""
    block = tl.load(numbers + 3) + first + tl.arange(0, BLOCKS).to(tl.int64)[:, None]
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    step = (block * 0 + tl.load(numbers)).to(tl.uint32)
    return tl.philox(tl.load(numbers + 1) | (tl.load(numbers + 2) << 32), low, high, step, step * 0)


@triton.jit
def _round_to_bf16(out, bits, numbers, num_values, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    w0, w1, w2, w3 = _words_of_entries(numbers, first, BLOCKS)
    half = tl.arange(0, 8)[None, :]
    word = tl.where(half < 4, tl.where(half < 2, w0, w1), tl.where(half < 6, w2, w3))
    noise = ((word >> (16 * (half % 2)).to(tl.uint32)) & 0xFFFF).to(tl.int64)
    entry = (first + tl.arange(0, BLOCKS)[:, None]) * 8 + half
    value = tl.load(bits + entry, mask=entry < num_values, other=0).to(tl.int64) & 0xFFFFFFFF
    tl.store(out + entry, ((value + noise) >> 16).to(tl.int16), mask=entry < num_values)


@triton.jit
def _move_on_grid(values, steps, numbers, num_values, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    w0, w1, w2, w3 = _words_of_entries(numbers, first, BLOCKS)
    place = tl.arange(0, 4)[None, :]
    word = tl.where(place < 2, tl.where(place < 1, w0, w1), tl.where(place < 3, w2, w3)).to(tl.float64)
    entry = (first + tl.arange(0, BLOCKS)[:, None]) * 4 + place
    step = tl.load(steps + entry, mask=entry < num_values, other=0).to(tl.float64)
    whole = tl.floor(tl.abs(step))
    size = whole + (word < (tl.abs(step) - whole) * 4294967296.0).to(tl.float64)
    moved = tl.load(values + entry, mask=entry < num_values, other=0).to(tl.float64) + tl.where(step > 0, size, -size)
    tl.store(values + entry, tl.minimum(tl.maximum(moved, -127.0), 127.0).to(tl.int8), mask=entry < num_values)


@triton.jit
def _fill_from_table(out, counters, table, num_values, BLOCKS: tl.constexpr):
    directions, counter = counters
    d, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS
    block, byte = (
        (tl.load(counter + 3) + first + tl.arange(0, BLOCKS)).to(tl.uint32)[:, None],
        tl.arange(0, 16)[None, :],
    )
    zero = block * 0
    direction, step = zero + tl.load(directions + d).to(tl.uint32), zero + tl.load(counter).to(tl.uint32)
    key = tl.load(counter + 1) | (tl.load(counter + 2) << 32)
    w0, w1, w2, w3 = tl.philox(key, block, direction, step, zero)
    word = tl.where(byte < 8, tl.where(byte < 4, w0, w1), tl.where(byte < 12, w2, w3))
    index = (word >> (8 * (byte % 4)).to(tl.uint32)) & 255
    value = first.to(tl.int64) * 16 + tl.arange(0, BLOCKS)[:, None] * 16 + byte
    tl.store(out + d * num_values + value, tl.load(table + index), mask=value < num_values)
