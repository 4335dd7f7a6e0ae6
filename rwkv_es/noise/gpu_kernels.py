"""Philox4x32-10 and the byte table on a GPU (Triton), with the bits of `factors.table_values`."""

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
