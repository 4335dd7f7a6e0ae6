"""Fused GPU kernels (Triton) around the matrix products of a layer: the names and operands of `cpu.kernels`.

One program works on one row, in `update_state` on one head of a row; it never looks at another, so that a row's bits
depend on nothing but itself. Each kernel adds the output side of the perturbations whose product it consumes, and takes
the input side of those whose operand it makes, computing in fp32. Where factors lie is compiled in: no address waits
for another load. Of a row that is not live nothing is read or written.

With TRITON_INTERPRET=1, set before this module is imported, Triton runs the kernels on CPU tensors in its interpreter.
"""

import triton
import triton.language as tl
from torch import Tensor

from rwkv_es.gpu.operands import LayerNoise, LayerVectors, Work
from rwkv_es.model.layers import MATRICES

if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 4):
    raise ImportError(f"the kernels take tuples, as Triton knows them from 3.4 on; this is {triton.__version__}")

NUM_MATRICES = tl.constexpr(len(MATRICES))
K_H = tl.constexpr(64)  # head size
R, K, V, OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
W1, A1, V1, G1 = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
W2, A2, V2, G2 = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
FFN_KEY, FFN_VALUE = tl.constexpr(12), tl.constexpr(13)
_RANK, _WIDTH = tl.constexpr(0), tl.constexpr(1)  # places in a layout
_INPUT, _OUTPUT = tl.constexpr(2), tl.constexpr(2 + 14)
_LIVE, _PARTS = tl.constexpr(4), tl.constexpr(6)  # places in a LayerNoise
_LOG_DECAY = tl.constexpr(-0.606531)
_HIDDEN_TILE = 4096  # of the channel mix's F values, which several programs share


def parts_of(num_hidden: int) -> int:
    """Return how many programs share a row of the channel mix."""
    return triton.cdiv(num_hidden, _HIDDEN_TILE)


def norm_and_mix(x: Tensor, shift: Tensor, layer: LayerVectors, mixed: Tensor, noise: LayerNoise) -> None:
    """Begin a time mix: layer norm, token shift, the six mixes: x (S,C) -> mixed (6,S,C) in the order r k v w a g.

    In place: shift (S,C) becomes the normalised x.
    """
    width, tile, num_warps = _tile(x, 256)
    sizes = {"LAYOUT": noise.layout, "SIZES": (width, tile)}
    _norm_and_mix[(len(x),)]((x, shift, mixed), layer, noise[:-1], **sizes, num_warps=num_warps)


def activate_pairs(w: Tensor, a: Tensor, v: Tensor, g: Tensor, noise: LayerNoise) -> None:
    """Between the two halves of the low-rank pairs, in place: tanh for w (S,R_w), sigmoid for g (S,R_g)."""
    halves = (w, a, v, g)
    _, tile, num_warps = _tile(max(halves, key=lambda half: half.shape[1]))
    sizes = {"LAYOUT": noise.layout, "WIDTHS": tuple(half.shape[1] for half in halves), "TILE": tile}
    _activate_pairs[(len(w),)](halves, noise[:-1], **sizes, num_warps=num_warps)


def update_state(state: Tensor, work: Work, layer: LayerVectors, is_first: bool, noise: LayerNoise) -> None:
    """The state update, group norm, bonus and gate: work -> work.mixed[0] (S,C), ready for the output matrix.

    In place: state (S,H,K_h,K_h) is renewed, v_first set by the first layer. One warp holds a head's whole state in its
    registers; it sees no whole row, so that `norm_and_shift` takes the output matrix's input side.
    """
    sizes = {"LAYOUT": noise.layout, "SIZES": (state.shape[1], int(is_first))}
    _update_state[tuple(state.shape[:2])]((state, work), layer, noise[:-1], **sizes, num_warps=1)


def norm_and_shift(x: Tensor, shift: Tensor, layer: LayerVectors, mixed: Tensor, noise: LayerNoise) -> None:
    """Begin a channel mix: x (S,C) -> layer norm, token shift and the mix -> mixed (S,C), which holds y before.

    In place: the output matrix's perturbation of y is added to x; shift (S,C) is renewed.
    """
    width, tile, num_warps = _tile(x)
    sizes = {"LAYOUT": noise.layout, "SIZES": (width, tile)}
    _norm_and_shift[(len(x),)]((x, shift, mixed), layer, noise[:-1], **sizes, num_warps=num_warps)


def square_relu(hidden: Tensor, noise: LayerNoise) -> None:
    """Squared ReLU between the channel mix's matrices, in place: hidden (S,F)."""
    _, tile, num_warps = _tile(hidden[:, :_HIDDEN_TILE])
    sizes = {"LAYOUT": noise.layout, "SIZES": (hidden.shape[1], tile)}
    _square_relu[(len(hidden), parts_of(hidden.shape[1]))](hidden, noise[:-1], **sizes, num_warps=num_warps)


def add_ffn_value(x: Tensor, noise: LayerNoise) -> None:
    """Add the last perturbation of a layer to x (S,C), in place."""
    width, tile, num_warps = _tile(x)
    sizes = {"LAYOUT": noise.layout, "SIZES": (width, tile), "PARTS": noise.parts.shape[1]}
    _add_ffn_value[(len(x),)](x, noise[:-1], **sizes, num_warps=num_warps)


def _tile(x: Tensor, values_per_warp: int = 512) -> tuple[int, int, int]:
    """Return the width of a row, that of the tile which holds it, and how many warps share its work."""
    width = x.shape[1]
    tile = max(triton.next_power_of_2(width), 16)
    return width, tile, min(max(tile // values_per_warp, 1), 16)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _load(pointer, span):
    """Load the columns of a span as fp32, zeros beyond its end; a span is columns (TILE,) and which of them exist."""
    return tl.load(pointer + span[0], mask=span[1], other=0).to(tl.float32)


@triton.jit
def _store(pointer, span, value):
    tl.store(pointer + span[0], value, mask=span[1])


@triton.jit
def _seen(noise, s, LAYOUT: tl.constexpr):
    """Return what a row sees of its perturbations: factors, place among the coefficients, sign, scales."""
    block, scale, direction, sign, _live, coefficient, _parts = noise
    sides = block + tl.load(direction + s) * (LAYOUT[_RANK] * LAYOUT[_WIDTH])
    return sides, coefficient + s * NUM_MATRICES * LAYOUT[_RANK], tl.load(sign + s).to(tl.float32), scale


@triton.jit
def _is_idle(noise, s):
    return tl.load(noise[_LIVE] + s) == 0


@triton.jit
def _term(x, span, at, LAYOUT: tl.constexpr, MATRIX: tl.constexpr):
    """Return the terms of <x, factor> for `at`, what is seen and a rank: zeros if the matrix is no target."""
    seen, q = at
    if LAYOUT[_INPUT + MATRIX] >= 0:
        return x * _load(seen[0] + q * LAYOUT[_WIDTH] + LAYOUT[_INPUT + MATRIX], span)
    else:
        return tl.zeros_like(x)


@triton.jit
def _take(terms, at, LAYOUT: tl.constexpr, MATRICES: tl.constexpr):
    """Take the input sides of two or four matrices at once, of one rank: coefficient = scale * sum of terms.

    terms (TILE,2) or (TILE,2,2): what `tl.join` has put side by side; -1: of no matrix.
    """
    seen, q = at
    half = tl.arange(0, 2)
    if len(MATRICES) == 2:
        matrix = tl.where(half == 0, MATRICES[0], MATRICES[1])
    else:
        first, second = tl.where(half == 0, MATRICES[0], MATRICES[1]), tl.where(half == 0, MATRICES[2], MATRICES[3])
        matrix = tl.where(half[None, :] == 0, first[:, None], second[:, None])
    scale = tl.load(seen[3] + matrix, mask=matrix >= 0, other=0) * seen[2]
    tl.store(seen[1] + matrix * LAYOUT[_RANK] + q, tl.sum(terms, 0) * scale, mask=matrix >= 0)


@triton.jit
def _added(y, span, seen, LAYOUT: tl.constexpr, MATRIX: tl.constexpr):
    """Add the output side of a perturbation: y + sum over ranks of coefficient * factor."""
    if LAYOUT[_OUTPUT + MATRIX] >= 0:
        for q in range(LAYOUT[_RANK]):
            coefficient = tl.load(seen[1] + MATRIX * LAYOUT[_RANK] + q)
            y += coefficient * _load(seen[0] + q * LAYOUT[_WIDTH] + LAYOUT[_OUTPUT + MATRIX], span)
    return y


@triton.jit
def _normal(x, span, norm, C: tl.constexpr):
    """Layer norm with eps 1e-5: x (TILE,), norm (2,C) weight and bias -> (TILE,)."""
    centered = tl.where(span[1], x - tl.sum(x) / C, 0)
    inverse = 1 / tl.sqrt(tl.sum(centered * centered) / C + 1e-5)
    return centered * inverse * _load(norm, span) + _load(norm + C, span)


@triton.jit
def _mix(place, values, m, layer, span):
    """Mix the shifted token into the normalised one, place (C,) of memory; return what stands there."""
    normal, step = values
    mixed = normal + step * _load(layer.mixes + m, span)
    _store(place, span, mixed)
    return mixed


@triton.jit
def _six_mixes(values, at, seen, LAYOUT: tl.constexpr, C: tl.constexpr):
    """Make the operands of r k v w a g out of a normalised row and the step to the one before, and their input sides.

    at: where the first stands, its span, and the layer.
    """
    place, span, layer = at
    pitch = tl.num_programs(0).to(tl.int64) * C
    # Sums are taken in groups: more at a time mean fewer meetings of the threads, but more registers than there are.
    r = _mix(place, values, 0, layer, span)
    k = _mix(place + pitch, values, C, layer, span)
    for q in range(LAYOUT[_RANK]):
        of_r, of_k = _term(r, span, (seen, q), LAYOUT, R), _term(k, span, (seen, q), LAYOUT, K)
        _take(tl.join(of_r, of_k), (seen, q), LAYOUT, (R, K))
    v = _mix(place + 2 * pitch, values, 2 * C, layer, span)
    w = _mix(place + 3 * pitch, values, 3 * C, layer, span)
    for q in range(LAYOUT[_RANK]):
        of_v, of_v1 = _term(v, span, (seen, q), LAYOUT, V), _term(v, span, (seen, q), LAYOUT, V1)
        of_w = _term(w, span, (seen, q), LAYOUT, W1)
        _take(tl.join(tl.join(of_v, of_v1), tl.join(of_w, tl.zeros_like(of_w))), (seen, q), LAYOUT, (V, V1, W1, -1))
    a = _mix(place + 4 * pitch, values, 4 * C, layer, span)
    g = _mix(place + 5 * pitch, values, 5 * C, layer, span)
    for q in range(LAYOUT[_RANK]):
        of_a, of_g = _term(a, span, (seen, q), LAYOUT, A1), _term(g, span, (seen, q), LAYOUT, G1)
        _take(tl.join(of_a, of_g), (seen, q), LAYOUT, (A1, G1))


@triton.jit
def _norm_and_mix(rows, layer, noise, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    C: tl.constexpr = SIZES[0]
    TILE: tl.constexpr = SIZES[1]
    x, shift, mixed = rows
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    if _is_idle(noise, s):
        return
    span = (columns, columns < C)
    shifted = _load(shift + s * C, span)  # before the norm's sums, at which the threads meet: shift is overwritten
    normal = _normal(_load(x + s * C, span), span, layer.norms, C)
    _store(shift + s * C, span, normal)
    _six_mixes((normal, shifted - normal), (mixed + s * C, span, layer), _seen(noise, s, LAYOUT), LAYOUT, C)


@triton.jit
def _activate_pairs(halves, noise, LAYOUT: tl.constexpr, WIDTHS: tl.constexpr, TILE: tl.constexpr):
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    if _is_idle(noise, s):
        return
    w, a, v, g = halves
    span_w, span_a = (columns, columns < WIDTHS[0]), (columns, columns < WIDTHS[1])
    span_v, span_g = (columns, columns < WIDTHS[2]), (columns, columns < WIDTHS[3])
    w, a, v, g = w + s * WIDTHS[0], a + s * WIDTHS[1], v + s * WIDTHS[2], g + s * WIDTHS[3]
    seen = _seen(noise, s, LAYOUT)
    w_row = 2 * _sigmoid(2 * _added(_load(w, span_w), span_w, seen, LAYOUT, W1)) - 1  # tanh
    a_row = _added(_load(a, span_a), span_a, seen, LAYOUT, A1)
    v_row = _added(_load(v, span_v), span_v, seen, LAYOUT, V1)
    g_row = _sigmoid(_added(_load(g, span_g), span_g, seen, LAYOUT, G1))
    _store(w, span_w, w_row)
    _store(a, span_a, a_row)
    _store(v, span_v, v_row)
    _store(g, span_g, g_row)
    for q in range(LAYOUT[_RANK]):
        of_w, of_a = _term(w_row, span_w, (seen, q), LAYOUT, W2), _term(a_row, span_a, (seen, q), LAYOUT, A2)
        of_v, of_g = _term(v_row, span_v, (seen, q), LAYOUT, V2), _term(g_row, span_g, (seen, q), LAYOUT, G2)
        _take(tl.join(tl.join(of_w, of_a), tl.join(of_v, of_g)), (seen, q), LAYOUT, (W2, A2, V2, G2))


@triton.jit
def _value(rows, at, seen, LAYOUT: tl.constexpr, IS_FIRST: tl.constexpr):
    """Return v of a head: the first layer's own, which it keeps, later ones mixed with that."""
    work, layer = rows
    row, pitch, span, C = at
    v = _added(_load(work.products + 2 * pitch + row, span), span, seen, LAYOUT, V)
    if IS_FIRST:
        _store(work.v_first + row, span, v)
    else:
        mix = _added(_load(work.products + 5 * pitch + row, span), span, seen, LAYOUT, V2)
        mix = _sigmoid(_load(layer.vectors + 2 * C, span) + mix)
        v += (_load(work.v_first + row, span) - v) * mix
    return v


@triton.jit
def _renewed(state, w, kk, a, k_and_v):
    """Return one head's next state: S diag(w) - (S kk)(kk*a)^T + v k^T, state (K_h,K_h) as [key, value]."""
    k, v = k_and_v
    removed = tl.sum(state * kk[:, None], 0)
    return state * w[:, None] - (a * kk)[:, None] * removed[None, :] + k[:, None] * v[None, :]


@triton.jit
def _group_norm(y, span, vectors, C):
    """Group norm of one head, eps 64e-5: y (K_h,), vectors (2,C) weight and bias -> (K_h,)."""
    centered = y - tl.sum(y) / K_H
    inverse = 1 / tl.sqrt(tl.sum(centered * centered) / K_H + 64e-5)
    return centered * inverse * _load(vectors, span) + _load(vectors + C, span)


@triton.jit
def _read_token(old, rows, at, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    """Let a head's state (K_h,K_h) read one row: store y and return the next state; SIZES: C, is it layer 0."""
    C: tl.constexpr = SIZES[0]
    IS_FIRST: tl.constexpr = SIZES[1]
    work, layer, seen = rows
    s, h, pitch = at
    columns = h * K_H + tl.arange(0, K_H)
    span, row, vectors = (columns, columns < C), s * C, layer.vectors
    product = work.products + row
    v = _value((work, layer), (row, pitch, span, C), seen, LAYOUT, IS_FIRST)
    r = _added(_load(product, span), span, seen, LAYOUT, R)
    k = _added(_load(product + pitch, span), span, seen, LAYOUT, K)
    w = _added(_load(product + 3 * pitch, span), span, seen, LAYOUT, W2)
    a = _added(_load(product + 4 * pitch, span), span, seen, LAYOUT, A2)
    g = _added(_load(product + 6 * pitch, span), span, seen, LAYOUT, G2)
    w = tl.exp(_sigmoid(_load(vectors, span) + w) * _LOG_DECAY)
    a = _sigmoid(_load(vectors + C, span) + a)
    kk = k * _load(vectors + 3 * C, span)
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk)), 1e-12)
    k *= 1 + (a - 1) * _load(vectors + 4 * C, span)
    renewed = _renewed(old, w, kk, a, (k, v))
    y = _group_norm(tl.sum(renewed * r[:, None], 0), span, vectors + 6 * C, C)
    bonus = tl.sum(r * k * _load(vectors + 5 * C, span))
    _store(work.mixed + row, span, (y + bonus * v) * g)
    return renewed


@triton.jit
def _update_state(rows, layer, noise, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    HEADS: tl.constexpr = SIZES[0]
    IS_FIRST: tl.constexpr = SIZES[1]
    state, work = rows
    s, h, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, K_H)
    if _is_idle(noise, s):
        return
    cells = state + (s * HEADS + h) * (K_H * K_H) + j[:, None] * K_H + j[None, :]
    old = tl.load(cells).to(tl.float32)  # first of all: it is what takes time
    at = (s, h, tl.num_programs(0).to(tl.int64) * HEADS * K_H)
    tl.store(cells, _read_token(old, (work, layer, _seen(noise, s, LAYOUT)), at, LAYOUT, (HEADS * K_H, IS_FIRST)))


@triton.jit
def _with_output(row, y, span, seen, LAYOUT: tl.constexpr):
    """Add the output matrix's perturbation of what stands at y (C,) to a row."""
    if LAYOUT[_INPUT + OUT] >= 0:
        y, scale = _load(y, span), tl.load(seen[3] + OUT) * seen[2]
        for q in range(LAYOUT[_RANK]):
            coefficient = tl.sum(_term(y, span, (seen, q), LAYOUT, OUT)) * scale
            row += coefficient * _load(seen[0] + q * LAYOUT[_WIDTH] + LAYOUT[_OUTPUT + OUT], span)
    return row


@triton.jit
def _ffn_mix(values, at, layer, seen, LAYOUT: tl.constexpr):
    """Make the channel mix's operand out of a normalised row and the one before, and its input side."""
    normal, shifted = values
    mixture, span = normal + (shifted - normal) * _load(layer.ffn_mix, at[1]), at[1]
    _store(at[0], span, mixture)
    for q in range(LAYOUT[_RANK]):
        total = tl.sum(_term(mixture, span, (seen, q), LAYOUT, FFN_KEY))
        tl.store(seen[1] + FFN_KEY * LAYOUT[_RANK] + q, total * tl.load(seen[3] + FFN_KEY) * seen[2])


@triton.jit
def _norm_and_shift(rows, layer, noise, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    C: tl.constexpr = SIZES[0]
    TILE: tl.constexpr = SIZES[1]
    x, shift, mixed = rows
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    if _is_idle(noise, s):
        return
    x, shift, mixed, span = x + s * C, shift + s * C, mixed + s * C, (columns, columns < C)
    shifted, seen = _load(shift, span), _seen(noise, s, LAYOUT)
    row = _with_output(_load(x, span), mixed, span, seen, LAYOUT)
    if LAYOUT[_INPUT + OUT] >= 0:
        _store(x, span, row)
    normal = _normal(row, span, layer.norms + 2 * C, C)
    _store(shift, span, normal)
    _ffn_mix((normal, shifted), (mixed, span), layer, seen, LAYOUT)


@triton.jit
def _square_relu(hidden, noise, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    F: tl.constexpr = SIZES[0]
    TILE: tl.constexpr = SIZES[1]
    s, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _is_idle(noise, s):
        return
    columns = part * TILE + tl.arange(0, TILE)
    span, seen = (columns, columns < F), _seen(noise, s, LAYOUT)
    positive = tl.maximum(_added(_load(hidden + s * F, span), span, seen, LAYOUT, FFN_KEY), 0)
    _store(hidden + s * F, span, positive * positive)
    for q in range(LAYOUT[_RANK]):
        total = tl.sum(_term(positive * positive, span, (seen, q), LAYOUT, FFN_VALUE))
        place = (s * tl.num_programs(1) + part) * LAYOUT[_RANK] + q
        tl.store(noise[_PARTS] + place, total * tl.load(seen[3] + FFN_VALUE) * seen[2])


@triton.jit
def _add_ffn_value(x, noise, LAYOUT: tl.constexpr, SIZES: tl.constexpr, PARTS: tl.constexpr):
    C: tl.constexpr = SIZES[0]
    TILE: tl.constexpr = SIZES[1]
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    if _is_idle(noise, s):
        return
    if LAYOUT[_OUTPUT + FFN_VALUE] >= 0:
        span, seen = (columns, columns < C), _seen(noise, s, LAYOUT)
        row = _load(x + s * C, span)
        for q in range(LAYOUT[_RANK]):
            coefficient = tl.load(noise[_PARTS] + s * PARTS * LAYOUT[_RANK] + q)
            for part in range(1, PARTS):
                coefficient += tl.load(noise[_PARTS] + (s * PARTS + part) * LAYOUT[_RANK] + q)
            row += coefficient * _load(seen[0] + q * LAYOUT[_WIDTH] + LAYOUT[_OUTPUT + FFN_VALUE], span)
        _store(x + s * C, span, row)


IS_INTERPRETED = not isinstance(_square_relu, triton.runtime.JITFunction)
