"""Philox4x32-10 and the byte table as one CPU kernel (numba); `noise.philox` is the reference that it equals."""

import sys

import numpy as np

from rwkv_es.noise.compiled import compiled

if sys.byteorder != "little":
    raise ImportError("the kernels read the bytes of a word lowest first; plain torch operations do it anywhere")

LANES = 16  # blocks computed side by side: with 8 the compiler unrolls them instead of using vectors
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@compiled(nogil=True)
def fill_from_table(out, first_block, directions, counter, table):
    """Fill out (D,n): value v of row d is table[byte v % 16 of the block first_block + v // 16].

    A block's counter is (block, directions[d], step, 0), its bytes are taken lowest first. directions (D,) int64,
    counter (3,) uint64: step and key, 32 bits each; table (256,).
    """
    words = np.empty((LANES, 4), np.uint32)
    index = words.view(np.uint8).reshape(LANES * 16)
    step, key = counter[0], counter[1:]
    for d in range(len(directions)):
        row = out[d]
        for place in range(0, len(row), len(index)):
            philox_lanes(words, first_block + place // 16, directions[d], step, key)
            for i in range(min(len(index), len(row) - place)):
                row[place + i] = table[index[i]]


@compiled(nogil=True, inline="always")
def philox_lanes(words, first, direction, step, key):
    """Fill words (LANES,4) uint32 with the random words of the blocks first, first + 1, ... of a direction."""
    for lane in range(LANES):
        c0, c1, c2, c3 = np.uint64(first + lane), np.uint64(direction), np.uint64(step), np.uint64(0)
        k0, k1 = key[0], key[1]
        for _ in range(10):
            p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
            c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
            k0 = (k0 + np.uint64(0x9E3779B9)) & _LOW
            k1 = (k1 + np.uint64(0xBB67AE85)) & _LOW
        words[lane, 0], words[lane, 1] = np.uint32(c0), np.uint32(c1)
        words[lane, 2], words[lane, 3] = np.uint32(c2), np.uint32(c3)
