"""Fused GPU kernels (Triton) around the matrix products of a layer: the names and operands of `cpu_kernels`.

One program works on one row, in `update_state` on one head of a row; it never looks at another, so that a row's bits
depend on nothing but itself. Each kernel adds the output side of the perturbations whose product it consumes, and takes
the input side of those whose operand it makes. Whatever is loaded is computed with in fp32.

With TRITON_INTERPRET=1, set before this module is imported, Triton runs the kernels on CPU tensors in its interpreter.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 3):
    raise ImportError(f"the kernels take tuples, which Triton knows from 3.3 on; this is Triton {triton.__version__}")

MATRICES = (
    *("att.receptance.weight", "att.key.weight", "att.value.weight", "att.output.weight"),
    *("att.w1", "att.a1", "att.v1", "att.g1", "att.w2", "att.a2", "att.v2", "att.g2"),
    *("ffn.key.weight", "ffn.value.weight"),
)
NUM_MATRICES = tl.constexpr(14)
K_H = tl.constexpr(64)  # head size
R, K, V, OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
W1, A1, V1, G1 = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
W2, A2, V2, G2 = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
FFN_KEY, FFN_VALUE = tl.constexpr(12), tl.constexpr(13)
_LOG_DECAY = tl.constexpr(-0.606531)
_VALUES_PER_WARP = 512
_BLOCKS_PER_PROGRAM = 64


class LayerNoise(NamedTuple):
    """A layer's perturbations, as its kernels read them."""

    block: Tensor  # (D,r,width) bf16 or fp32: every direction's factors, side by side in order of use
    place: Tensor  # (2*NUM_MATRICES,) int32: where matrix m's input side starts, then the output sides; -1: no target
    scale: Tensor  # (NUM_MATRICES,) fp32: sigma * multiplier / sqrt(r)
    direction: Tensor  # (S,) int64: each row's place in the block
    sign: Tensor  # (S,)
    coefficient: Tensor  # (S,NUM_MATRICES,r) fp32: carries scale * sign * (x @ B) from the input to the output side
    rank: int
    width: int


class LayerVectors(NamedTuple):
    """A layer's parameters that are no matrices."""

    norms: Tensor  # (2,2,C): ln1 and ln2, weight and bias
    mixes: Tensor  # (6,C): x_r x_k x_v x_w x_a x_g
    vectors: Tensor  # (8,C): w0 a0 v0 k_k k_a r_k, ln_x's weight and bias
    ffn_mix: Tensor  # (C,)


class Work(NamedTuple):
    """The rows' values on their way through a time mix."""

    mixed: Tensor  # (6,S,C): the operands of r k v w a g; later y in [0]
    products: Tensor  # (7,S,C): r k v, then the pairs' w a v g
    v_first: Tensor  # (S,C): layer 0's value


def norm_and_mix(x: Tensor, shift: Tensor, layer: LayerVectors, mixed: Tensor, noise: LayerNoise) -> None:
    """Begin a time mix: layer norm, token shift, the six mixes: x (S,C) -> mixed (6,S,C) in the order r k v w a g.

    In place: shift (S,C) becomes the normalised x.
    """
    width, tile, num_warps = _tile(x)
    _norm_and_mix[(len(x),)]((x, shift, mixed), layer, noise, C=width, TILE=tile, num_warps=num_warps)


def activate_pairs(w: Tensor, a: Tensor, v: Tensor, g: Tensor, noise: LayerNoise) -> None:
    """Between the two halves of the low-rank pairs, in place: tanh for w (S,R_w), sigmoid for g (S,R_g)."""
    _, tile, num_warps = _tile(max((w, a, v, g), key=lambda half: half.shape[1]))
    widths = (w.shape[1], a.shape[1], v.shape[1], g.shape[1])
    _activate_pairs[(len(w),)]((w, a, v, g), widths, noise, TILE=tile, num_warps=num_warps)


def update_state(state: Tensor, work: Work, layer: LayerVectors, is_first: bool, noise: LayerNoise) -> None:
    """The state update, group norm, bonus and gate: work -> work.mixed[0] (S,C), ready for the output matrix.

    In place: state (S,H,K_h,K_h) is renewed, v_first set by the first layer. The output matrix's input side is taken
    by `norm_and_shift`: no program here sees a whole row.
    """
    _update_state[tuple(state.shape[:2])](state, work, layer, noise, IS_FIRST=is_first, num_warps=4)


def norm_and_shift(x: Tensor, shift: Tensor, layer: LayerVectors, mixed: Tensor, noise: LayerNoise) -> None:
    """Begin a channel mix: x (S,C) -> layer norm, token shift and the mix -> mixed (S,C), which holds y before.

    In place: the output matrix's perturbation of y is added to x; shift (S,C) is renewed.
    """
    width, tile, num_warps = _tile(x)
    _norm_and_shift[(len(x),)]((x, shift, mixed), layer, noise, C=width, TILE=tile, num_warps=num_warps)


def square_relu(hidden: Tensor, noise: LayerNoise) -> None:
    """Squared ReLU between the channel mix's matrices, in place: hidden (S,F)."""
    width, tile, num_warps = _tile(hidden)
    _square_relu[(len(hidden),)](hidden, noise, F=width, TILE=tile, num_warps=num_warps)


def add_ffn_value(x: Tensor, noise: LayerNoise) -> None:
    """Add the last perturbation of a layer to x (S,C), in place."""
    width, tile, num_warps = _tile(x)
    _add_ffn_value[(len(x),)](x, noise, C=width, TILE=tile, num_warps=num_warps)


def fill_from_table(out: Tensor, directions: Tensor, counter: Tensor, table: Tensor) -> None:
    """Fill out (D,n): value v of row d is table[byte v % 16 of the block (v // 16, directions[d], step, 0)].

    directions (D,) int64, counter (3,) int64: the step and the key's two words, table (256,) of the dtype of out.
    """
    num_values = out.shape[1]
    grid = (len(out), triton.cdiv(num_values, 16 * _BLOCKS_PER_PROGRAM))
    _fill_from_table[grid](out, (directions, counter), table, num_values, BLOCKS=_BLOCKS_PER_PROGRAM)


def _tile(x: Tensor) -> tuple[int, int, int]:
    """Return the width of a row, that of the tile which holds it, and how many warps share its work."""
    width = x.shape[1]
    tile = max(triton.next_power_of_2(width), 16)
    return width, tile, min(max(tile // _VALUES_PER_WARP, 1), 16)


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
def _sides(noise, s):
    """Return where the factors of row s's direction start."""
    return noise.block + tl.load(noise.direction + s) * noise.rank * noise.width


@triton.jit
def _scale(noise, s, MATRIX: tl.constexpr):
    return tl.load(noise.scale + MATRIX) * tl.load(noise.sign + s).to(tl.float32)


@triton.jit
def _take(x, span, noise, s, MATRIX: tl.constexpr):
    """Take the input side of a perturbation: coefficient = scale * <x, factor>, for every rank."""
    place = tl.load(noise.place + MATRIX)
    if place >= 0:
        side, scale = _sides(noise, s) + place, _scale(noise, s, MATRIX)
        for q in range(noise.rank):
            total = tl.sum(x * _load(side + q * noise.width, span))
            tl.store(noise.coefficient + (s * NUM_MATRICES + MATRIX) * noise.rank + q, total * scale)


@triton.jit
def _added(y, span, noise, s, MATRIX: tl.constexpr):
    """Add the output side of a perturbation: y + sum over ranks of coefficient * factor."""
    place = tl.load(noise.place + NUM_MATRICES + MATRIX)
    if place >= 0:
        side = _sides(noise, s) + place
        for q in range(noise.rank):
            coefficient = tl.load(noise.coefficient + (s * NUM_MATRICES + MATRIX) * noise.rank + q)
            y += coefficient * _load(side + q * noise.width, span)
    return y


@triton.jit
def _normal(x, span, norm, C: tl.constexpr):
    """Layer norm with eps 1e-5: x (TILE,), norm (2,C) weight and bias -> (TILE,)."""
    centred = tl.where(span[1], x - tl.sum(x) / C, 0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred) / C + 1e-5)
    return centred * inverse * _load(norm, span) + _load(norm + C, span)


@triton.jit
def _mix(place, values, m, layer, span):
    """Mix the shifted token into the normalised one, place (C,) of memory; return what stands there."""
    normal, step = values
    mixed = normal + step * _load(layer.mixes + m, span)
    _store(place, span, mixed)
    return mixed


@triton.jit
def _norm_and_mix(rows, layer, noise, C: tl.constexpr, TILE: tl.constexpr):
    x, shift, mixed = rows
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    span, pitch = (columns, columns < C), tl.num_programs(0).to(tl.int64) * C
    shifted = _load(shift + s * C, span)  # before the norm's sums, at which the threads meet: shift is overwritten
    normal = _normal(_load(x + s * C, span), span, layer.norms, C)
    values = (normal, shifted - normal)
    _store(shift + s * C, span, normal)
    place = mixed + s * C
    _take(_mix(place, values, 0, layer, span), span, noise, s, R)
    _take(_mix(place + pitch, values, C, layer, span), span, noise, s, K)
    for_value = _mix(place + 2 * pitch, values, 2 * C, layer, span)
    _take(for_value, span, noise, s, V)
    _take(for_value, span, noise, s, V1)
    _take(_mix(place + 3 * pitch, values, 3 * C, layer, span), span, noise, s, W1)
    _take(_mix(place + 4 * pitch, values, 4 * C, layer, span), span, noise, s, A1)
    _take(_mix(place + 5 * pitch, values, 5 * C, layer, span), span, noise, s, G1)


@triton.jit
def _activate_pairs(halves, widths, noise, TILE: tl.constexpr):
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    w, a, v, g = halves
    span_w, span_a = (columns, columns < widths[0]), (columns, columns < widths[1])
    span_v, span_g = (columns, columns < widths[2]), (columns, columns < widths[3])
    w, a, v, g = w + s * widths[0], a + s * widths[1], v + s * widths[2], g + s * widths[3]
    w_row = 2 * _sigmoid(2 * _added(_load(w, span_w), span_w, noise, s, W1)) - 1  # tanh
    a_row = _added(_load(a, span_a), span_a, noise, s, A1)
    v_row = _added(_load(v, span_v), span_v, noise, s, V1)
    g_row = _sigmoid(_added(_load(g, span_g), span_g, noise, s, G1))
    _store(w, span_w, w_row)
    _store(a, span_a, a_row)
    _store(v, span_v, v_row)
    _store(g, span_g, g_row)
    _take(w_row, span_w, noise, s, W2)
    _take(a_row, span_a, noise, s, A2)
    _take(v_row, span_v, noise, s, V2)
    _take(g_row, span_g, noise, s, G2)


@triton.jit
def _value(work, span, layer, noise, IS_FIRST: tl.constexpr):
    """Return v of a head: the first layer's own, which it keeps, later ones mixed with that."""
    s, C = tl.program_id(0).to(tl.int64), tl.num_programs(1) * K_H
    row, pitch = s * C, tl.num_programs(0).to(tl.int64) * C
    v = _added(_load(work.products + 2 * pitch + row, span), span, noise, s, V)
    if IS_FIRST:
        _store(work.v_first + row, span, v)
    else:
        mix = _added(_load(work.products + 5 * pitch + row, span), span, noise, s, V2)
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
    centred = y - tl.sum(y) / K_H
    inverse = 1 / tl.sqrt(tl.sum(centred * centred) / K_H + 64e-5)
    return centred * inverse * _load(vectors, span) + _load(vectors + C, span)


@triton.jit
def _update_state(state, work, layer, noise, IS_FIRST: tl.constexpr):
    s, h, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    C, j = num_heads * K_H, tl.arange(0, K_H)
    columns = h * K_H + j
    span, row, pitch = (columns, columns < C), s * C, tl.num_programs(0).to(tl.int64) * C
    product, vectors = work.products + row, layer.vectors
    v = _value(work, span, layer, noise, IS_FIRST)
    r = _added(_load(product, span), span, noise, s, R)
    k = _added(_load(product + pitch, span), span, noise, s, K)
    w = _added(_load(product + 3 * pitch, span), span, noise, s, W2)
    a = _added(_load(product + 4 * pitch, span), span, noise, s, A2)
    g = _added(_load(product + 6 * pitch, span), span, noise, s, G2)
    w = tl.exp(_sigmoid(_load(vectors, span) + w) * _LOG_DECAY)
    a = _sigmoid(_load(vectors + C, span) + a)
    kk = k * _load(vectors + 3 * C, span)
    kk = kk / tl.maximum(tl.sqrt(tl.sum(kk * kk)), 1e-12)
    k *= 1 + (a - 1) * _load(vectors + 4 * C, span)
    cells = state + (s * num_heads + h) * (K_H * K_H) + j[:, None] * K_H + j[None, :]
    renewed = _renewed(tl.load(cells).to(tl.float32), w, kk, a, (k, v))
    tl.store(cells, renewed)
    y = _group_norm(tl.sum(renewed * r[:, None], 0), span, vectors + 6 * C, C)
    bonus = tl.sum(r * k * _load(vectors + 5 * C, span))
    _store(work.mixed + row, span, (y + bonus * v) * g)


@triton.jit
def _norm_and_shift(rows, layer, noise, C: tl.constexpr, TILE: tl.constexpr):
    x, shift, mixed = rows
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    x, shift, mixed, span = x + s * C, shift + s * C, mixed + s * C, (columns, columns < C)
    row, shifted, place = _load(x, span), _load(shift, span), tl.load(noise.place + OUT)
    if place >= 0:
        y, scale, sides = _load(mixed, span), _scale(noise, s, OUT), _sides(noise, s)
        output_side = sides + tl.load(noise.place + NUM_MATRICES + OUT)
        for q in range(noise.rank):
            coefficient = tl.sum(y * _load(sides + place + q * noise.width, span)) * scale
            row += coefficient * _load(output_side + q * noise.width, span)
        _store(x, span, row)
    normal = _normal(row, span, layer.norms + 2 * C, C)
    mixture = normal + (shifted - normal) * _load(layer.ffn_mix, span)
    _store(shift, span, normal)
    _store(mixed, span, mixture)
    _take(mixture, span, noise, s, FFN_KEY)


@triton.jit
def _square_relu(hidden, noise, F: tl.constexpr, TILE: tl.constexpr):
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    span = (columns, columns < F)
    positive = tl.maximum(_added(_load(hidden + s * F, span), span, noise, s, FFN_KEY), 0)
    _store(hidden + s * F, span, positive * positive)
    _take(positive * positive, span, noise, s, FFN_VALUE)


@triton.jit
def _add_ffn_value(x, noise, C: tl.constexpr, TILE: tl.constexpr):
    s, columns = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    span = (columns, columns < C)
    _store(x + s * C, span, _added(_load(x + s * C, span), span, noise, s, FFN_VALUE))


@triton.jit
def _fill_from_table(out, counters, table, num_values, BLOCKS: tl.constexpr):
    directions, counter = counters
    d, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCKS
    block, byte = (first + tl.arange(0, BLOCKS)).to(tl.uint32)[:, None], tl.arange(0, 16)[None, :]
    zero = block * 0
    direction, step = zero + tl.load(directions + d).to(tl.uint32), zero + tl.load(counter).to(tl.uint32)
    key = tl.load(counter + 1) | (tl.load(counter + 2) << 32)
    w0, w1, w2, w3 = tl.philox(key, block, direction, step, zero)
    word = tl.where(byte < 8, tl.where(byte < 4, w0, w1), tl.where(byte < 12, w2, w3))
    index = (word >> (8 * (byte % 4)).to(tl.uint32)) & 255
    value = first.to(tl.int64) * 16 + tl.arange(0, BLOCKS)[:, None] * 16 + byte
    tl.store(out + d * num_values + value, tl.load(table + index), mask=value < num_values)


IS_INTERPRETED = not isinstance(_square_relu, triton.runtime.JITFunction)
