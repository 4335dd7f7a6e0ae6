"""Random rounding as CPU kernels (numba); `update.round_stochastically` and `int8.move_` are the references."""

import numpy as np

from rwkv_es.noise.compiled import compiled
from rwkv_es.noise.kernels import LANES, philox_lanes


@compiled(nogil=True)
def round_to_bf16(out, bits, start, step, key):
    """Fill out (n,) uint16 with bf16 neighbours of the fp32 values whose bits (n,) uint32 are given.

    Entry i takes the 16-bit half i % 8 of the block (start + i) // 8; start is a multiple of 8.
    """
    words = np.empty((LANES, 4), np.uint32)
    halves = words.view(np.uint16).reshape(LANES * 8)
    for place in range(0, len(bits), len(halves)):
        philox_lanes(words, (start + place) // 8, 0, step, key)
        for i in range(min(len(halves), len(bits) - place)):
            out[place + i] = np.uint16((np.uint64(bits[place + i]) + np.uint64(halves[i])) >> np.uint64(16))


@compiled(nogil=True)
def move_on_grid(values, steps, start, step, key):
    """Add steps (n,) fp32, in units of the grid, to int8 values (n,) in place, randomly rounded and clipped to +-127.

    Entry i takes the word i % 4 of the block (start + i) // 4; start is a multiple of 4.
    """
    words = np.empty((LANES, 4), np.uint32)
    flat = words.reshape(LANES * 4)
    for place in range(0, len(values), len(flat)):
        philox_lanes(words, (start + place) // 4, 0, step, key)
        for i in range(min(len(flat), len(values) - place)):
            t = np.float64(steps[place + i])
            whole = np.floor(abs(t))
            size = whole + (np.float64(flat[i]) < (abs(t) - whole) * 4294967296.0)
            moved = values[place + i] + (size if t > 0 else -size)
            values[place + i] = np.int8(min(max(moved, -127.0), 127.0))
