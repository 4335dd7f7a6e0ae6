"""The four down-projections of a time mix side by side (Triton): each alone would fill a part of a GPU.

A program makes a tile of one product. The sums of a row are made in one order, whatever other rows there are.
"""

import triton
import triton.language as tl
from torch import Tensor, bfloat16

from rwkv_es.gpu.kernels import IS_INTERPRETED

_OPERANDS = tl.constexpr((3, 4, 2, 5))  # of w a v g, among r k v w a g
_TILE = tl.constexpr(64)  # rows, and terms of a sum that are read at once
_IN_FP32 = tl.constexpr(IS_INTERPRETED)  # the interpreter multiplies the bits of bf16


def project_down(mixed: Tensor, matrices: list[Tensor | None], halves: tuple[Tensor, ...]) -> None:
    """Set halves (S,R) of w a v g to the operands in mixed (6,S,C) times (C,R), all contiguous; None: no matrix."""
    num_rows, width = mixed.shape[1:]
    widths = tuple(0 if matrix is None else matrix.shape[1] for matrix in matrices)
    tile, warps = (128, 4) if mixed.dtype == bfloat16 else (64, 8)
    grid = triton.cdiv(num_rows, _TILE.value), sum(triton.cdiv(columns, tile) for columns in widths)
    there = tuple(mixed if matrix is None else matrix for matrix in matrices)
    sizes = {"WIDTHS": widths, "SIZES": (width, tile)}
    _project_down[grid]((mixed, there, halves), num_rows, **sizes, num_warps=warps, num_stages=4)


@triton.jit
def _project_down(tensors, num_rows, WIDTHS: tl.constexpr, SIZES: tl.constexpr):
    column = tl.program_id(1)
    mixed, matrices, halves = tensors
    for m in tl.static_range(4):
        if (column >= 0) & (column * SIZES[1] < WIDTHS[m]):
            operand = mixed + _OPERANDS[m] * num_rows.to(tl.int64) * SIZES[0]
            _make_tile((operand, matrices[m], halves[m]), column, num_rows, WIDTHS[m], SIZES)
        column -= tl.cdiv(WIDTHS[m], SIZES[1])


@triton.jit
def _make_tile(tensors, column, num_rows, WIDTH: tl.constexpr, SIZES: tl.constexpr):
    TILE: tl.constexpr = SIZES[1]  # tl.zeros asks for a name
    x, matrix, half = tensors
    rows = tl.program_id(0).to(tl.int64) * _TILE + tl.arange(0, _TILE)[:, None]
    columns, terms = column * TILE + tl.arange(0, TILE)[None, :], tl.arange(0, _TILE)
    total = tl.zeros((_TILE, TILE), dtype=tl.float32)
    for k in range(0, SIZES[0], _TILE):
        a = tl.load(x + rows * SIZES[0] + (k + terms)[None, :], mask=rows < num_rows, other=0)
        b = tl.load(matrix + (k + terms)[:, None] * WIDTH + columns, mask=columns < WIDTH, other=0)
        if _IN_FP32:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(half + rows * WIDTH + columns, total.to(half.dtype.element_ty), mask=(rows < num_rows) & (columns < WIDTH))
