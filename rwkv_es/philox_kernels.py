"""Philox4x32-10 and the byte table as one CPU kernel (numba); `noise.philox` is the reference that it equals."""

import numba
import numpy as np

LANES = 8  # blocks computed side by side, so that the compiler can vectorise over them
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@numba.njit(nogil=True, cache=True)
def fill_from_table(out, directions, step, key, table):
    """Fill out (D,n): value v of row d is table[byte v % 16 of the block (v // 16, directions[d], step, 0)].

    directions (D,) int64, key (2,) uint64 with 32 bits each, table (256,). The lowest byte of a word comes first.
    """
    num_values = out.shape[1]
    num_blocks = (num_values + 15) // 16
    words = np.empty((4, LANES), np.uint64)
    for d in range(len(directions)):
        for first in range(0, num_blocks, LANES):
            philox_lanes(words, first, directions[d], step, key)
            for lane in range(min(LANES, num_blocks - first)):
                place = (first + lane) * 16
                for i in range(min(16, num_values - place)):
                    shift = np.uint64(8 * (i % 4))
                    out[d, place + i] = table[np.int64((words[i // 4, lane] >> shift) & np.uint64(255))]


@numba.njit(nogil=True, cache=True, inline="always")
def philox_lanes(words, first, direction, step, key):
    """Fill words (4,LANES) with the random words of the blocks first, first + 1, ... of a direction."""
    for lane in range(LANES):
        c0, c1, c2, c3 = np.uint64(first + lane), np.uint64(direction), np.uint64(step), np.uint64(0)
        k0, k1 = key[0], key[1]
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
            k0 = (k0 + np.uint64(0x9E3779B9)) & _LOW
            k1 = (k1 + np.uint64(0xBB67AE85)) & _LOW
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = c0, c1, c2, c3
