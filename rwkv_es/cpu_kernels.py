"""Fused CPU kernels (numba) around the matrix products of a layer; `model.py` holds the reference that they equal.

Rows are independent and every row runs the same code, so that its bits depend on nothing but itself. Each kernel adds
the output side of the perturbations whose product it consumes, and takes the input side of those whose operand it
makes, while the values are in the cache: no pass over memory is made for a perturbation alone.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

MATRICES = (
    *("att.receptance.weight", "att.key.weight", "att.value.weight", "att.output.weight"),
    *("att.w1", "att.a1", "att.v1", "att.g1", "att.w2", "att.a2", "att.v2", "att.g2"),
    *("ffn.key.weight", "ffn.value.weight"),
)
NUM_MATRICES = len(MATRICES)
K_H = 64  # head size: a constant, so that loops over a head are unrolled into vectors
R, K, V, OUT, W1, A1, V1, G1, W2, A2, V2, G2, FFN_KEY, FFN_VALUE = range(NUM_MATRICES)


class LayerNoise(NamedTuple):
    """A layer's perturbations, as its kernels read them."""

    block: np.ndarray  # (D,r,width) uint16: every direction's factors, side by side in order of use, as bf16 bits
    place: np.ndarray  # (2*NUM_MATRICES,): where matrix m's input side starts, then the output sides; -1: no target
    scale: np.ndarray  # (NUM_MATRICES,): sigma * multiplier / sqrt(r)
    direction: np.ndarray  # (S,) int64: each row's place in the block
    sign: np.ndarray  # (S,)
    coefficient: np.ndarray  # (S,NUM_MATRICES,r): carries scale * sign * (x @ B) from the input to the output side


class LayerVectors(NamedTuple):
    """A layer's parameters that are no matrices."""

    norms: np.ndarray  # (2,2,C): ln1 and ln2, weight and bias
    mixes: np.ndarray  # (6,C): x_r x_k x_v x_w x_a x_g
    vectors: np.ndarray  # (8,C): w0 a0 v0 k_k k_a r_k, ln_x's weight and bias
    ffn_mix: np.ndarray  # (C,)


class Work(NamedTuple):
    """The rows' values on their way through a time mix."""

    mixed: np.ndarray  # (6,S,C): the operands of r k v w a g; later y in [0] and the removal key in [1]
    products: np.ndarray  # (7,S,C): r k v, then the pairs' w a v g
    v_first: np.ndarray  # (S,C): layer 0's value


_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
_ONE, _HALF = np.float32(1), np.float32(0.5)
_LOG_DECAY = np.float32(-0.606531)

_kernel = numba.njit(nogil=True, fastmath=True, cache=True, error_model="numpy")
_inline = numba.njit(nogil=True, fastmath=True, cache=True, error_model="numpy", inline="always")


@_inline
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


@_inline
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@_inline
def _value(bits):
    """Return the number of a bf16's bits: exactly the factor, at half of its memory traffic."""
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


@_inline
def _take(x, noise, s, matrix):
    """Take the input side of a perturbation: coefficient = scale * <x, factor>, for every rank."""
    place = noise.place[matrix]
    if place < 0:
        return
    scale = noise.scale[matrix] * noise.sign[s]
    sides, end = noise.block[noise.direction[s]], place + len(x)
    blocked = len(sides) // 4 * 4
    for q in range(0, blocked, 4):  # four ranks for one reading of x
        f0, f1 = sides[q][place:end], sides[q + 1][place:end]
        f2, f3 = sides[q + 2][place:end], sides[q + 3][place:end]
        t0 = t1 = t2 = t3 = np.float32(0)
        for c in range(len(x)):
            t0 += x[c] * _value(f0[c])
            t1 += x[c] * _value(f1[c])
            t2 += x[c] * _value(f2[c])
            t3 += x[c] * _value(f3[c])
        noise.coefficient[s, matrix, q] = t0 * scale
        noise.coefficient[s, matrix, q + 1] = t1 * scale
        noise.coefficient[s, matrix, q + 2] = t2 * scale
        noise.coefficient[s, matrix, q + 3] = t3 * scale
    for q in range(blocked, len(sides)):
        side = sides[q][place:end]
        total = np.float32(0)
        for c in range(len(x)):
            total += x[c] * _value(side[c])
        noise.coefficient[s, matrix, q] = total * scale


@_inline
def _add(y, noise, s, matrix):
    """Add the output side of a perturbation: y += sum over ranks of coefficient * factor."""
    place = noise.place[NUM_MATRICES + matrix]
    if place < 0:
        return
    sides, end = noise.block[noise.direction[s]], place + len(y)
    weight = noise.coefficient[s, matrix]
    blocked = len(sides) // 4 * 4
    for q in range(0, blocked, 4):  # four ranks for one pass over y
        f0, f1 = sides[q][place:end], sides[q + 1][place:end]
        f2, f3 = sides[q + 2][place:end], sides[q + 3][place:end]
        w0, w1, w2, w3 = weight[q], weight[q + 1], weight[q + 2], weight[q + 3]
        for c in range(len(y)):
            y[c] += w0 * _value(f0[c]) + w1 * _value(f1[c]) + w2 * _value(f2[c]) + w3 * _value(f3[c])
    for q in range(blocked, len(sides)):
        side, w0 = sides[q][place:end], weight[q]
        for c in range(len(y)):
            y[c] += w0 * _value(side[c])


@_inline
def _normalise(x, norm, out):
    """Layer norm with eps 1e-5: x (C,), norm (2,C) weight and bias -> out (C,)."""
    mean = np.float32(0)
    for c in range(len(x)):
        mean += x[c]
    mean /= np.float32(len(x))
    variance = np.float32(0)
    for c in range(len(x)):
        variance += (x[c] - mean) * (x[c] - mean)
    inverse = _ONE / np.sqrt(variance / np.float32(len(x)) + np.float32(1e-5))
    for c in range(len(x)):
        out[c] = (x[c] - mean) * inverse * norm[0, c] + norm[1, c]


@_kernel
def norm_and_mix(x, shift, layer, mixed, noise):
    """Begin a time mix: layer norm, token shift, the six mixes: x (S,C) -> mixed (6,S,C) in the order r k v w a g.

    In place: shift (S,C) becomes the normalised x.
    """
    normal = np.empty(x.shape[1], np.float32)
    for s in range(len(x)):
        _normalise(x[s], layer.norms[0], normal)
        for m in range(6):
            for c in range(len(normal)):
                mixed[m, s, c] = normal[c] + (shift[s, c] - normal[c]) * layer.mixes[m, c]
        for c in range(len(normal)):
            shift[s, c] = normal[c]
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
        for c in range(w.shape[1]):
            w[s, c] = np.float32(2) * _sigmoid(np.float32(2) * w[s, c]) - _ONE
        for c in range(g.shape[1]):
            g[s, c] = _sigmoid(g[s, c])
        _take(w[s], noise, s, W2)
        _take(a[s], noise, s, A2)
        _take(v[s], noise, s, V2)
        _take(g[s], noise, s, G2)


@_inline
def _finish_vectors(s, work, layer, is_first, noise):
    """Make decay, learning rate, removal key, key and value of row s from the products, in place."""
    vectors, products, v_first, kk = layer.vectors, work.products, work.v_first[s], work.mixed[1, s]
    w0, a0, v0, k_k, k_a = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
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


@_inline
def _gather_head(parts, head):
    """Copy what the state update of a head reads, (K_h,) each, into one place: head (5*K_h,).

    Its parts are r, w, k, a * kk and kk, the removal key being normalised. One place and the flat state are all
    that the loops of `_update_head` touch: the compiler then sees at once that nothing overlaps.
    """
    r, w, k, a, kk = parts
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
        head[3 * K_H + j] = a[j] * kk[j] * inverse
    for j in range(K_H):
        head[4 * K_H + j] = kk[j] * inverse


@_inline
def _update_head(state, head, v, y):
    """Renew one head's state in place and read it: state (K_h*K_h,), head from `_gather_head`, v and y (K_h,)."""
    for i in range(0, K_H, 2):  # two values for one reading of the keys; four were slower
        at = i * K_H
        t0 = t1 = np.float32(0)
        for j in range(K_H):
            t0 += state[at + j] * head[4 * K_H + j]
            t1 += state[at + K_H + j] * head[4 * K_H + j]
        v0, v1 = v[i], v[i + 1]
        y0 = y1 = np.float32(0)
        for j in range(K_H):
            s0 = state[at + j] * head[K_H + j] - t0 * head[3 * K_H + j] + v0 * head[2 * K_H + j]
            s1 = state[at + K_H + j] * head[K_H + j] - t1 * head[3 * K_H + j] + v1 * head[2 * K_H + j]
            state[at + j] = s0
            state[at + K_H + j] = s1
            y0 += s0 * head[j]
            y1 += s1 * head[j]
        y[i], y[i + 1] = y0, y1


@_inline
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


@_inline
def _mix_head(state, work, layer, head, place):
    """Renew the state of row s, head h (place), read it, and finish its part of y in work.mixed[0]."""
    s, h = place
    p, q = h * K_H, (h + 1) * K_H  # one index, then a slice: numba keeps such views contiguous
    r, k, v = work.products[0, s][p:q], work.products[1, s][p:q], work.products[2, s][p:q]
    w, a, g = work.products[3, s][p:q], work.products[4, s][p:q], work.products[6, s][p:q]
    y, kk, r_k = work.mixed[0, s][p:q], work.mixed[1, s][p:q], layer.vectors[5][p:q]
    _gather_head((r, w, k, a, kk), head)
    _update_head(state.reshape(K_H * K_H), head, v, y)
    _norm_head(y, layer.vectors[6][p:q], layer.vectors[7][p:q])
    bonus = np.float32(0)
    for j in range(K_H):
        bonus += r[j] * k[j] * r_k[j]
    for j in range(K_H):
        y[j] = (y[j] + bonus * v[j]) * g[j]


@_kernel
def update_state(state, work, layer, is_first, noise):
    """The state update, group norm, bonus and gate: work -> work.mixed[0] (S,C), ready for the output matrix.

    In place: state (S,H,K_h,K_h) is renewed, v_first set by the first layer.
    """
    num_rows, num_heads = state.shape[:2]
    head = np.empty(5 * K_H, np.float32)
    for s in range(num_rows):
        _finish_vectors(s, work, layer, is_first, noise)
        for h in range(num_heads):
            _mix_head(state[s, h], work, layer, head, (s, h))
        _take(work.mixed[0, s], noise, s, OUT)


@_kernel
def norm_and_shift(x, shift, layer, mixed, noise):
    """Begin a channel mix: x (S,C) -> layer norm, token shift and the mix -> mixed (S,C).

    In place: the output matrix's perturbation is added to x; shift (S,C) is renewed.
    """
    normal = np.empty(x.shape[1], np.float32)
    for s in range(len(x)):
        _add(x[s], noise, s, OUT)
        _normalise(x[s], layer.norms[1], normal)
        for c in range(len(normal)):
            mixed[s, c] = normal[c] + (shift[s, c] - normal[c]) * layer.ffn_mix[c]
            shift[s, c] = normal[c]
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
