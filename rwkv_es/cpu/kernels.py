"""Fused CPU kernels (numba) around the matrix products of a layer; `model.py` holds the reference that they equal.

Rows are independent and every row runs the same code, so that its bits depend on nothing but itself. Each kernel adds
the output side of the perturbations whose product it consumes, and takes the input side of those whose operand it
makes, while the values are in the cache: no pass over memory is made for a perturbation alone.

If shifts and state have one row, it reads all the rows of x as its tokens, one after the other.
"""

import math
from typing import NamedTuple

import numpy as np

from rwkv_es.cpu.vectors import LANES, OPTIONS, dot, fma, inline, load, load_bf16, mul, splat, store, sub, value
from rwkv_es.model.layers import MATRICES, VECTORS
from rwkv_es.noise.compiled import compiled

NUM_MATRICES, NUM_VECTORS = len(MATRICES), len(VECTORS)
K_H = 64  # head size: a constant, so that loops over a head are unrolled into vectors
R, K, V, OUT, W1, A1, V1, G1, W2, A2, V2, G2, FFN_KEY, FFN_VALUE = range(NUM_MATRICES)
LN1, LN1_BIAS, LN2, LN2_BIAS, X_R, X_K, X_V, X_W, X_A, X_G = range(10)
W0, A0, V0, K_K, K_A, R_K, LN_X, LN_X_BIAS, FFN_X_K = range(10, NUM_VECTORS)


class LayerNoise(NamedTuple):
    """A layer's perturbations, as its kernels read them."""

    block: np.ndarray  # (D,r,width) uint16: every direction's factors, side by side in order of use, as bf16 bits
    place: np.ndarray  # (2*NUM_MATRICES,): where matrix m's input side starts, then the output sides; -1: no target
    scale: np.ndarray  # (NUM_MATRICES,): sigma * multiplier / sqrt(r)
    vectors: np.ndarray  # (D,n,C) uint16: the vectors' noise, as bf16 bits
    vector_place: np.ndarray  # (NUM_VECTORS,): where a vector's noise is among the n; -1: no target
    vector_scale: np.ndarray  # (NUM_VECTORS,): sigma * multiplier
    direction: np.ndarray  # (S,) int64: each row's place in the block
    sign: np.ndarray  # (S,)
    coefficient: np.ndarray  # (S,NUM_MATRICES,r): carries scale * sign * (x @ B) from the input to the output side
    own: np.ndarray  # (NUM_VECTORS,C): where a row's own vectors are made


class Work(NamedTuple):
    """The rows' values on their way through a time mix."""

    mixed: np.ndarray  # (6,S,C): the operands of r k v w a g; later y in [0] and the removal key in [1]
    products: np.ndarray  # (7,S,C): r k v, then the pairs' w a v g
    v_first: np.ndarray  # (S,C): layer 0's value
    heads: np.ndarray  # (HEADS_AT_ONCE or more,5*K_h): see `_gather_head`


_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_ONE, _HALF = np.float32(1), np.float32(0.5)
_LOG_DECAY = np.float32(-0.606531)
HEADS_AT_ONCE = 64  # or those of one row, if it has more

_kernel = compiled(**OPTIONS)


@inline
def _exp(x):
    """Exponential by a polynomial that the compiler can vectorise; relative error below 2e-7 in [-87, 88]."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    k = np.int32(math.floor(x * _LOG2_E + _HALF))
    f = x - np.float32(k) * _LN_2
    p = np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + _ONE
    return p * np.int32((k + 127) << 23).view(np.float32)


@inline
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@inline
def _take(x, noise, s, matrix):
    """Take the input side of a perturbation: coefficient = scale * <x, factor>, for every rank."""
    place = noise.place[matrix]
    if place < 0:
        return
    scale = noise.scale[matrix] * noise.sign[s]
    sides, end = noise.block[noise.direction[s]], place + len(x)
    for q in range(len(sides)):
        noise.coefficient[s, matrix, q] = dot(x, sides[q][place:end]) * scale


@inline
def _add(y, noise, s, matrix):
    """Add the output side of a perturbation: y += sum over ranks of coefficient * factor."""
    place = noise.place[NUM_MATRICES + matrix]
    if place < 0:
        return
    sides, end = noise.block[noise.direction[s]], place + len(y)
    weight, whole = noise.coefficient[s, matrix], len(y) // LANES * LANES
    blocked = len(sides) // 4 * 4
    for q in range(0, blocked, 4):  # four ranks for one pass over y
        f0, f1 = sides[q][place:end], sides[q + 1][place:end]
        f2, f3 = sides[q + 2][place:end], sides[q + 3][place:end]
        w0, w1, w2, w3 = splat(weight[q]), splat(weight[q + 1]), splat(weight[q + 2]), splat(weight[q + 3])
        for c in range(0, whole, LANES):
            more = fma(w1, load_bf16(f1, c), fma(w0, load_bf16(f0, c), load(y, c)))
            store(y, c, fma(w3, load_bf16(f3, c), fma(w2, load_bf16(f2, c), more)))
        for c in range(whole, len(y)):
            more = weight[q] * value(f0[c]) + weight[q + 1] * value(f1[c])
            y[c] += more + weight[q + 2] * value(f2[c]) + weight[q + 3] * value(f3[c])
    for q in range(blocked, len(sides)):
        side, w0 = sides[q][place:end], splat(weight[q])
        for c in range(0, whole, LANES):
            store(y, c, fma(w0, load_bf16(side, c), load(y, c)))
        for c in range(whole, len(y)):
            y[c] += weight[q] * value(side[c])


@inline
def _vector(vectors, noise, s, which):
    """Return a vector as row s sees it, (C,): the one of all rows, or its own, made anew."""
    shared, place = vectors[which], noise.vector_place[which]
    if place < 0:
        return shared
    own, values = noise.own[which], noise.vectors[noise.direction[s]][place]
    weight = splat(noise.vector_scale[which] * noise.sign[s])
    for c in range(0, len(shared), LANES):
        store(own, c, fma(weight, load_bf16(values, c), load(shared, c)))
    return own


@inline
def _normalise(x, weight, bias, out):
    """Layer norm with eps 1e-5: x (C,), weight and bias (C,) -> out (C,)."""
    mean = np.float32(0)
    for c in range(len(x)):
        mean += x[c]
    mean /= np.float32(len(x))
    variance = np.float32(0)
    for c in range(len(x)):
        variance += (x[c] - mean) * (x[c] - mean)
    inverse = _ONE / np.sqrt(variance / np.float32(len(x)) + np.float32(1e-5))
    for c in range(len(x)):
        out[c] = (x[c] - mean) * inverse * weight[c] + bias[c]


@_kernel
def norm_and_mix(x, shift, vectors, mixed, noise):
    """Begin a time mix: layer norm, token shift, the six mixes: x (S,C) -> mixed (6,S,C) in the order r k v w a g.

    In place: shift (S,C) becomes the normalised x.
    """
    for s in range(len(x)):
        old, normal = shift[min(s, len(shift) - 1)], mixed[5, s]
        _normalise(x[s], _vector(vectors, noise, s, LN1), _vector(vectors, noise, s, LN1_BIAS), normal)
        x_r, x_k = _vector(vectors, noise, s, X_R), _vector(vectors, noise, s, X_K)
        x_v, x_w = _vector(vectors, noise, s, X_V), _vector(vectors, noise, s, X_W)
        x_a, x_g = _vector(vectors, noise, s, X_A), _vector(vectors, noise, s, X_G)
        for c in range(0, len(normal), LANES):
            values = load(normal, c)
            change = sub(load(old, c), values)
            store(old, c, values)
            store(mixed[0, s], c, fma(change, load(x_r, c), values))
            store(mixed[1, s], c, fma(change, load(x_k, c), values))
            store(mixed[2, s], c, fma(change, load(x_v, c), values))
            store(mixed[3, s], c, fma(change, load(x_w, c), values))
            store(mixed[4, s], c, fma(change, load(x_a, c), values))
            store(mixed[5, s], c, fma(change, load(x_g, c), values))
        _take(mixed[0, s], noise, s, R)
        _take(mixed[1, s], noise, s, K)
        _take(mixed[2, s], noise, s, V)
        _take(mixed[2, s], noise, s, V1)
        _take(mixed[3, s], noise, s, W1)
        _take(mixed[4, s], noise, s, A1)
        _take(mixed[5, s], noise, s, G1)


@_kernel
def activate_pairs(w, a, v, g, noise):
    """Between the two halves of the low-rank pairs, in place: tanh for w (S,R_w), sigmoid for g (S,R_g)."""
    for s in range(len(w)):
        _add(w[s], noise, s, W1)
        _add(a[s], noise, s, A1)
        _add(v[s], noise, s, V1)
        _add(g[s], noise, s, G1)
    flat_w, flat_g = w.reshape(w.size), g.reshape(g.size)  # a row alone is too short for the compiler's vectors
    for c in range(len(flat_w)):
        flat_w[c] = np.float32(2) * _sigmoid(np.float32(2) * flat_w[c]) - _ONE
    for c in range(len(flat_g)):
        flat_g[c] = _sigmoid(flat_g[c])
    for s in range(len(w)):
        _take(w[s], noise, s, W2)
        _take(a[s], noise, s, A2)
        _take(v[s], noise, s, V2)
        _take(g[s], noise, s, G2)


@inline
def _finish_vectors(s, work, vectors, is_first, noise):
    """Make decay, learning rate, removal key, key and value of row s from the products, in place."""
    products, v_first, kk = work.products, work.v_first[s], work.mixed[1, s]
    w0, a0, v0 = _vector(vectors, noise, s, W0), _vector(vectors, noise, s, A0), _vector(vectors, noise, s, V0)
    k_k, k_a = _vector(vectors, noise, s, K_K), _vector(vectors, noise, s, K_A)
    r, k, v, w = products[0, s], products[1, s], products[2, s], products[3, s]
    a, mix_v, g = products[4, s], products[5, s], products[6, s]
    _add(r, noise, s, R)
    _add(k, noise, s, K)
    _add(v, noise, s, V)
    _add(w, noise, s, W2)
    _add(a, noise, s, A2)
    _add(g, noise, s, G2)
    for c in range(len(w)):
        w[c] = _exp(_LOG_DECAY * _sigmoid(w0[c] + w[c]))
    for c in range(len(w)):
        a[c] = _sigmoid(a0[c] + a[c])
    if is_first:
        for c in range(len(w)):
            v_first[c] = v[c]
    else:
        _add(mix_v, noise, s, V2)
        for c in range(len(w)):
            v[c] += (v_first[c] - v[c]) * _sigmoid(v0[c] + mix_v[c])
    for c in range(len(w)):
        kk[c] = k[c] * k_k[c]
        k[c] *= _ONE + (a[c] - _ONE) * k_a[c]


@inline
def _gather_head(work, place, head):
    """Copy what the state update of row s, head h (place) reads, (K_h,) each, into one place: head (5*K_h,).

    Its parts are r, w, k, -a * kk and kk, the removal key being normalised.
    """
    s, h = place
    p, q = h * K_H, (h + 1) * K_H  # one index, then a slice: numba keeps such views contiguous
    r, k, w = work.products[0, s][p:q], work.products[1, s][p:q], work.products[3, s][p:q]
    a, kk = work.products[4, s][p:q], work.mixed[1, s][p:q]
    square = np.float32(0)
    for j in range(K_H):
        square += kk[j] * kk[j]
    inverse = _ONE / max(np.sqrt(square), np.float32(1e-12))
    for j in range(K_H):
        head[j] = r[j]
    for j in range(K_H):
        head[K_H + j] = w[j]
    for j in range(K_H):
        head[2 * K_H + j] = k[j]
    for j in range(K_H):
        head[3 * K_H + j] = -a[j] * kk[j] * inverse
    for j in range(K_H):
        head[4 * K_H + j] = kk[j] * inverse


@inline
def _update_head(state, head, v, y):
    """Renew one head's state in place and read it: state (K_h,K_h), head from `_gather_head`, v and y (K_h,).

    The 64 values of a key lie side by side, in four vectors, so that no sum goes across a vector.
    """
    zero = splat(np.float32(0))
    t0, t1, t2, t3 = zero, zero, zero, zero
    for j in range(K_H):
        kk, at = splat(head[4 * K_H + j]), j * K_H
        t0, t1 = fma(load(state, at), kk, t0), fma(load(state, at + 16), kk, t1)
        t2, t3 = fma(load(state, at + 32), kk, t2), fma(load(state, at + 48), kk, t3)
    v0, v1, v2, v3 = load(v, 0), load(v, 16), load(v, 32), load(v, 48)
    y0, y1, y2, y3 = zero, zero, zero, zero
    for j in range(K_H):
        r, w, at = splat(head[j]), splat(head[K_H + j]), j * K_H
        k, a = splat(head[2 * K_H + j]), splat(head[3 * K_H + j])
        s0 = fma(v0, k, fma(t0, a, mul(load(state, at), w)))
        s1 = fma(v1, k, fma(t1, a, mul(load(state, at + 16), w)))
        s2 = fma(v2, k, fma(t2, a, mul(load(state, at + 32), w)))
        s3 = fma(v3, k, fma(t3, a, mul(load(state, at + 48), w)))
        store(state, at, s0)
        store(state, at + 16, s1)
        store(state, at + 32, s2)
        store(state, at + 48, s3)
        y0, y1, y2, y3 = fma(s0, r, y0), fma(s1, r, y1), fma(s2, r, y2), fma(s3, r, y3)
    store(y, 0, y0)
    store(y, 16, y1)
    store(y, 32, y2)
    store(y, 48, y3)


@inline
def _norm_head(y, weight, bias):
    """Group norm of one head, in place, eps 64e-5."""
    size = np.float32(len(y))
    mean = np.float32(0)
    for j in range(len(y)):
        mean += y[j]
    mean /= size
    variance = np.float32(0)
    for j in range(len(y)):
        variance += (y[j] - mean) * (y[j] - mean)
    inverse = _ONE / np.sqrt(variance / size + np.float32(64e-5))
    for j in range(len(y)):
        y[j] = (y[j] - mean) * inverse * weight[j] + bias[j]


@inline
def _finish_head(work, place, r_k, weight, bias):
    """Make a head's part of work.mixed[0] from what was read of its state: group norm, bonus, gate."""
    s, h = place
    p, q = h * K_H, (h + 1) * K_H
    r, k, v = work.products[0, s][p:q], work.products[1, s][p:q], work.products[2, s][p:q]
    y, g, r_k = work.mixed[0, s][p:q], work.products[6, s][p:q], r_k[p:q]
    _norm_head(y, weight[p:q], bias[p:q])
    bonus = np.float32(0)
    for j in range(K_H):
        bonus += r[j] * k[j] * r_k[j]
    for j in range(K_H):
        y[j] = (y[j] + bonus * v[j]) * g[j]


@_kernel
def update_state(state, work, vectors, is_first, noise):
    """The state update, group norm, bonus and gate: work -> work.mixed[0] (S,C), ready for the output matrix.

    In place: state (S,H,K_h,K_h), fp32 or fp16 bits, is renewed, v_first set by the first layer. A few rows go through
    each of the three parts at once: states then come from memory in one stream, with nothing in between.
    """
    num_rows, num_heads = work.products.shape[1], state.shape[1]
    rows_at_once = max(HEADS_AT_ONCE // num_heads, 1)
    for first in range(0, num_rows, rows_at_once):
        last = min(first + rows_at_once, num_rows)
        for s in range(first, last):
            _finish_vectors(s, work, vectors, is_first, noise)
            for h in range(num_heads):
                _gather_head(work, (s, h), work.heads[(s - first) * num_heads + h])
        for s in range(first, last):
            of_row, v, y = state[min(s, len(state) - 1)], work.products[2, s], work.mixed[0, s]
            for h in range(num_heads):
                p, q = h * K_H, (h + 1) * K_H
                _update_head(of_row[h], work.heads[(s - first) * num_heads + h], v[p:q], y[p:q])
        for s in range(first, last):
            r_k, weight = _vector(vectors, noise, s, R_K), _vector(vectors, noise, s, LN_X)
            bias = _vector(vectors, noise, s, LN_X_BIAS)
            for h in range(num_heads):
                _finish_head(work, (s, h), r_k, weight, bias)
            _take(work.mixed[0, s], noise, s, OUT)


@_kernel
def norm_and_shift(x, shift, vectors, mixed, noise):
    """Begin a channel mix: x (S,C) -> layer norm, token shift and the mix -> mixed (S,C).

    In place: the output matrix's perturbation is added to x; shift (S,C) is renewed.
    """
    for s in range(len(x)):
        old, normal = shift[min(s, len(shift) - 1)], mixed[s]
        _add(x[s], noise, s, OUT)
        _normalise(x[s], _vector(vectors, noise, s, LN2), _vector(vectors, noise, s, LN2_BIAS), normal)
        x_k = _vector(vectors, noise, s, FFN_X_K)
        for c in range(0, len(normal), LANES):
            values = load(normal, c)
            change = sub(load(old, c), values)
            store(old, c, values)
            store(normal, c, fma(change, load(x_k, c), values))
        _take(mixed[s], noise, s, FFN_KEY)


@_kernel
def square_relu(hidden, noise):
    """Squared ReLU between the channel mix's matrices, in place: hidden (S,F)."""
    for s in range(len(hidden)):
        row = hidden[s]
        _add(row, noise, s, FFN_KEY)
        for c in range(len(row)):
            positive = max(row[c], np.float32(0))
            row[c] = positive * positive
        _take(row, noise, s, FFN_VALUE)


@_kernel
def add_ffn_value(x, noise):
    """Add the last perturbation of a layer to x (S,C), in place."""
    for s in range(len(x)):
        _add(x[s], noise, s, FFN_VALUE)


@_kernel
def exp_array(x, out):
    """Apply the kernels' exponential to every entry: x (n,) -> out (n,); for tests."""
    for i in range(len(x)):
        out[i] = _exp(x[i])
