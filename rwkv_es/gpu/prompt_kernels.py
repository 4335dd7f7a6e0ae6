"""Kernels that read many tokens of a row at once (Triton): those of `kernels` in which a token needs the one before.

Tokens of a row stand side by side, T for each of R rows, and are rows of a layer like any other: products and all other
kernels do not know. Each kernel computes with the functions of the token loop's, in their order, so that its bits are
those of token by token. A head's state stays in the registers of one warp from a row's first token to its last.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkv_es.gpu.kernels import (
    K_H,
    _ffn_mix,
    _is_idle,
    _load,
    _normal,
    _read_token,
    _seen,
    _six_mixes,
    _store,
    _tile,
    _with_output,
)
from rwkv_es.gpu.operands import LayerNoise, LayerVectors, Texts, Work


def norm_and_mix(x: Tensor, shift: Tensor, layer: LayerVectors, mixed: Tensor, read: tuple[Texts, LayerNoise]) -> None:
    """Begin a time mix as `kernels.norm_and_mix` does: x (R*T,C) -> mixed (6,R*T,C).

    In place: of every row that reads, shift (S,C) becomes its last token's normalised x.
    """
    texts, noise = read
    width, tile, num_warps = _tile(x, 256)
    sizes = {"LAYOUT": noise.layout, "SIZES": (width, tile, len(x) // len(texts.slot))}
    _mix_texts[(len(x),)]((x, shift, mixed), layer, (texts, noise[:-1]), **sizes, num_warps=num_warps)


def update_state(
    state: Tensor, work: Work, layer: LayerVectors, is_first: bool, read: tuple[Texts, LayerNoise]
) -> None:
    """Let states read their tokens one after the other, as `kernels.update_state` does: work -> work.mixed[0] (R*T,C).

    In place: state (S,H,K_h,K_h) of every row that reads, v_first.
    """
    texts, noise = read
    sizes = {"LAYOUT": noise.layout, "SIZES": (state.shape[1], int(is_first), work.v_first.shape[0] // len(texts.slot))}
    grid = len(texts.slot), state.shape[1]
    _update_texts[grid]((state, work), layer, (texts, noise[:-1]), **sizes, num_warps=1)


def norm_and_shift(
    x: tuple[Tensor, Tensor], shift: Tensor, layer: LayerVectors, mixed: Tensor, read: tuple[Texts, LayerNoise]
) -> None:
    """Begin a channel mix as `kernels.norm_and_shift` does, out of place: a token's neighbour needs what it replaces.

    x: (R*T,C) and where its perturbed value goes; mixed: y in [0], the operand in [1]. In place: shift (S,C).
    """
    texts, noise = read
    width, tile, num_warps = _tile(x[0])
    sizes = {"LAYOUT": noise.layout, "SIZES": (width, tile, len(x[0]) // len(texts.slot))}
    rows = (x, shift, (mixed[0], mixed[1]))
    _shift_texts[(len(x[0]),)](rows, layer, (texts, noise[:-1]), **sizes, num_warps=num_warps)


@triton.jit
def _beside(texts, s, TOKENS: tl.constexpr):
    """Return of a token: its slot, whether it is its row's first, and a neighbour: the one before, the first's last."""
    row, is_first = s // TOKENS, s % TOKENS == 0
    return tl.load(texts.slot + row), is_first, tl.where(is_first, s + tl.load(texts.length + row), s) - 1


@triton.jit
def _shifted(normal, place, span, is_first):
    """Return what a token follows, as the token loop has stored it; the first follows the state, which it renews.

    normal (TILE,): the neighbour's.
    """
    before = tl.load(place + span[0], mask=span[1] & is_first, other=0).to(tl.float32)
    tl.store(place + span[0], normal, mask=span[1] & is_first)
    return tl.where(is_first, before, normal.to(place.dtype.element_ty).to(tl.float32))


@triton.jit
def _mix_texts(rows, layer, read, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    C: tl.constexpr = SIZES[0]
    TILE: tl.constexpr = SIZES[1]
    x, shift, mixed = rows
    texts, noise = read
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    if _is_idle(noise, s):
        return
    span = (columns, columns < C)
    slot, is_first, other = _beside(texts, s, SIZES[2])
    normal = _normal(_load(x + s * C, span), span, layer.norms, C)
    beside = _normal(_load(x + other * C, span), span, layer.norms, C)
    shifted = _shifted(beside, shift + slot * C, span, is_first)
    _six_mixes((normal, shifted - normal), (mixed + s * C, span, layer), _seen(noise, s, LAYOUT), LAYOUT, C)


@triton.jit
def _update_texts(rows, layer, read, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    HEADS: tl.constexpr = SIZES[0]
    IS_FIRST: tl.constexpr = SIZES[1]
    TOKENS: tl.constexpr = SIZES[2]
    state, work = rows
    texts, noise = read
    row, h, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, K_H)
    count = tl.load(texts.length + row)
    if count == 0:
        return
    cells = state + (tl.load(texts.slot + row) * HEADS + h) * (K_H * K_H) + j[:, None] * K_H + j[None, :]
    held = tl.load(cells).to(tl.float32)
    pitch = tl.num_programs(0).to(tl.int64) * TOKENS * HEADS * K_H
    for t in range(count):
        s = row * TOKENS + t
        seen_by = (work, layer, _seen(noise, s, LAYOUT))
        held = _read_token(held, seen_by, (s, h, pitch), LAYOUT, (HEADS * K_H, IS_FIRST))
        held = held.to(state.dtype.element_ty).to(tl.float32)  # as it is stored between the ticks
    tl.store(cells, held)


@triton.jit
def _shift_texts(rows, layer, read, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    C: tl.constexpr = SIZES[0]
    TILE: tl.constexpr = SIZES[1]
    x, shift, mixed = rows
    texts, noise = read
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    if _is_idle(noise, s):
        return
    span, seen = (columns, columns < C), _seen(noise, s, LAYOUT)
    slot, is_first, other = _beside(texts, s, SIZES[2])
    row = _with_output(_load(x[0] + s * C, span), mixed[0] + s * C, span, seen, LAYOUT)
    _store(x[1] + s * C, span, row)
    normal = _normal(row, span, layer.norms + 2 * C, C)
    row = _with_output(_load(x[0] + other * C, span), mixed[0] + other * C, span, seen, LAYOUT)
    beside = _normal(row, span, layer.norms + 2 * C, C)
    shifted = _shifted(beside, shift + slot * C, span, is_first)
    _ffn_mix((normal, shifted), (mixed[1] + s * C, span), layer, seen, LAYOUT)
