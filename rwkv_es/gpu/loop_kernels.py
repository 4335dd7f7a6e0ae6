"""The token loop's own work on a GPU (Triton): which token each slot reads, which it writes, who enters and leaves.

A slot is read and written by its own program alone. All is at fixed addresses and nothing is decided by the host, so
that a whole tick can be one CUDA graph. With TRITON_INTERPRET=1 the kernels run on CPU tensors.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rwkv_es.gpu.operands import Reading

NOTHING, BROKEN = -1, -2  # in place of a token: the slot is at rest or in its prompt; its logits are not finite
PLACE, LIVE, POSITION, LENGTH, LIMIT, DIRECTION, SIGN, COUNTER = range(8)  # columns of an entry; 4 words; the prompt
NUM_COLUMNS = COUNTER + 4
STOPS, LIVES, RESTS = range(3)  # in the column LIVE; who rests has a prompt to read first
_BLOCK = 128  # slots
_VALUES = 1024  # of a state, or words of a prompt
_WORDS = 4096  # of the vocabulary
_NOTHING, _BROKEN = tl.constexpr(NOTHING), tl.constexpr(BROKEN)
_STOPS, _LIVES = tl.constexpr(STOPS), tl.constexpr(LIVES)
_COUNTER, _NUM_COLUMNS = tl.constexpr(COUNTER), tl.constexpr(NUM_COLUMNS)


class Slots(NamedTuple):
    """What is in the slots."""

    live: Tensor  # (S,) int32: 0: at rest
    position: Tensor  # (S,) int32: how many tokens it has read
    length: Tensor  # (S,) int32: of its prompt
    limit: Tensor  # (S,) int32: how many tokens it may write
    direction: Tensor  # (S,) int64
    sign: Tensor  # (S,)
    counter: Tensor  # (S,4) int64: of the sampling noise of its first token
    prompt: Tensor  # (S,T) int32
    written: Tensor  # (S,N) int32


class Choice(NamedTuple):
    """How a token is chosen among a row of logits."""

    logits: Tensor  # (S,V) fp32
    key: Tensor  # (2,) int64: of the sampling noise
    num_words: int  # the first ones may be chosen
    temperature: float  # 0: the likeliest
    end_id: int


def choose_tokens(tokens: Tensor, slots: Slots) -> None:
    """Set tokens (S,) int64 to what each slot reads next: of its prompt, then what it has written; 0 at rest."""
    sizes = (len(tokens), slots.prompt.shape[1], slots.written.shape[1])
    _choose_tokens[(triton.cdiv(len(tokens), _BLOCK),)](tokens, slots, SIZES=sizes, BLOCK=_BLOCK)


def choose_texts(reading: Reading, slots: Slots, places: Tensor) -> None:
    """Set what rows read next of their prompts, and count it: places (R,3) int32: slot, how many, does it live then."""
    sizes = (len(reading.tokens) // len(places), slots.prompt.shape[1])
    _choose_texts[(len(places),)](reading, slots, places, SIZES=sizes)


def write_tokens(heard: Tensor, slots: Slots, choice: Choice) -> None:
    """Count the token that was read; choose and write the next one if the prompt is over; come to rest at the end.

    heard (S,) int32: the token, or NOTHING or BROKEN.
    """
    tile = min(_WORDS, max(triton.next_power_of_2(choice.num_words), 16))
    num_loaded = min(-(-choice.num_words // 16) * 16, choice.logits.shape[1])  # a multiple of 16 bytes, where it can be
    sizes = (choice.num_words, tile, num_loaded, choice.logits.shape[1], slots.written.shape[1])
    options = {"SIZES": sizes, "END": (choice.temperature, choice.end_id)}
    _write_tokens[(len(heard),)](heard, slots, (choice.logits, choice.key), **options, num_warps=8)


def note_tokens(heard: Tensor, slots: Slots, tokens: Tensor, choice: Choice) -> None:
    """Do as `write_tokens` with tokens (S,) int64 that were chosen elsewhere; below 0: the logits are not finite."""
    sizes = (len(heard), slots.written.shape[1], choice.end_id)
    _note_tokens[(triton.cdiv(len(heard), _BLOCK),)](heard, slots, tokens, SIZES=sizes, BLOCK=_BLOCK)


def admit(slots: Slots, entries: Tensor) -> None:
    """Fill slots from entries (n,NUM_COLUMNS + T) int32: the columns named above, then the prompt."""
    sizes = (entries.shape[1], slots.prompt.shape[1])
    _admit[(len(entries),)](slots, entries, SIZES=sizes, TILE=_VALUES)


def copy_rows(target: Tensor, source: Tensor, places: Tensor) -> None:
    """Copy rows of every layer: target (L,S,...), source (L,R,...), places (n,2) int64: from, to; from -1: zeros."""
    width = target[0, 0].numel()
    grid = (len(places), len(target), triton.cdiv(width, _VALUES))
    strides = (target.stride(0), source.stride(0))
    _copy_rows[grid]((target, source), places, strides, WIDTH=width, TILE=_VALUES)


@triton.jit
def _choose_tokens(tokens, slots, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_slot = s < SIZES[0]
    is_live = tl.load(slots.live + s, mask=is_slot, other=0) != 0
    position = tl.load(slots.position + s, mask=is_live, other=0)
    length = tl.load(slots.length + s, mask=is_live, other=0)
    row = s.to(tl.int64)
    in_prompt = is_live & (position < length)
    read = tl.load(slots.prompt + row * SIZES[1] + position, mask=in_prompt, other=0)
    own = tl.load(slots.written + row * SIZES[2] + (position - length), mask=is_live & (position >= length), other=0)
    tl.store(tokens + s, tl.where(in_prompt, read, own).to(tl.int64), mask=is_slot)


@triton.jit
def _choose_texts(reading, slots, places, SIZES: tl.constexpr):
    TOKENS: tl.constexpr = SIZES[0]
    row, t = tl.program_id(0).to(tl.int64), tl.arange(0, TOKENS)
    slot, count = tl.load(places + 3 * row).to(tl.int64), tl.load(places + 3 * row + 1)
    is_there, is_read, at = count > 0, t < count, row * TOKENS + t
    position = tl.load(slots.position + slot)
    words = tl.load(slots.prompt + slot * SIZES[1] + position + t, mask=is_read, other=0)
    none = tl.zeros((TOKENS,), tl.int64)
    tl.store(reading.tokens + at, words.to(tl.int64))
    tl.store(reading.live + at, is_read.to(tl.int32))
    tl.store(reading.direction + at, none + tl.load(slots.direction + slot, mask=is_there, other=0))
    tl.store(reading.sign + at, tl.load(slots.sign + slot + none, mask=is_read, other=0))
    tl.store(reading.texts.slot + row, slot)
    tl.store(reading.texts.length + row, count)
    tl.store(slots.position + slot, position + count, mask=is_there)
    tl.store(slots.live + slot, tl.load(places + 3 * row + 2), mask=is_there)


@triton.jit
def _words(logits, columns, SIZES: tl.constexpr):
    """Return some logits (TILE,), -inf behind the words that may be chosen."""
    values = tl.load(logits + columns, mask=columns < SIZES[2], other=-float("inf"))
    return tl.where(columns < SIZES[0], values, -float("inf"))


@triton.jit
def _scan(logits, SIZES: tl.constexpr):
    """Return the largest of a row's logits, its first place, and whether one of them is no number."""
    TILE: tl.constexpr = SIZES[1]
    columns = tl.arange(0, TILE)
    best, place, is_bad = -float("inf"), 0, 0
    for start in range(0, SIZES[0], TILE):
        values = _words(logits, start + columns, SIZES)
        is_number = values == values  # noqa: PLR0124
        is_bad += 1 - tl.min(is_number.to(tl.int32), 0)
        values = tl.where(is_number, values, -float("inf"))
        top = tl.max(values, 0)
        first = start + tl.min(tl.where(values == top, columns, TILE), 0)
        place = tl.where(top > best, first, place)
        best = tl.maximum(best, top)
    return best, place, is_bad


@triton.jit
def _weight(logits, columns, best, SIZES: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Return the probabilities of some words, but for a factor: (TILE,) fp64."""
    return tl.exp((_words(logits, columns, SIZES) - best) / TEMPERATURE).to(tl.float64)


@triton.jit
def _draw(logits, best, number, SIZES: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Invert the distribution function at a number in [0, 1): sums of tiles, then the words of one tile."""
    TILE: tl.constexpr = SIZES[1]
    columns, total = tl.arange(0, TILE), tl.zeros((), tl.float64)
    for start in range(0, SIZES[0], TILE):
        total += tl.sum(_weight(logits, start + columns, best, SIZES, TEMPERATURE))
    point, before = number * total, tl.zeros((), tl.float64)
    chosen, base = tl.zeros((), tl.int32), tl.zeros((), tl.float64)
    for start in range(0, SIZES[0], TILE):  # the last tile that begins before the point, or at it
        mass = tl.sum(_weight(logits, start + columns, best, SIZES, TEMPERATURE))
        is_here = (before <= point) & (mass > 0)
        chosen, base = tl.where(is_here, start, chosen), tl.where(is_here, before, base)
        before += mass
    weight = _weight(logits, chosen + columns, best, SIZES, TEMPERATURE)
    passed = tl.sum((base + tl.cumsum(weight, 0) <= point).to(tl.int32))
    last = tl.max(tl.where(weight > 0, columns, 0), 0)  # rounding may put the point behind all that may be chosen
    return chosen + tl.minimum(passed, last)


@triton.jit
def _write_tokens(heard, slots, choice, SIZES: tl.constexpr, END: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    tl.store(heard + s, _NOTHING)
    if tl.load(slots.live + s) == 0:
        return
    position = tl.load(slots.position + s) + 1
    tl.store(slots.position + s, position)
    place = position - tl.load(slots.length + s)
    if place < 0:
        return
    logits = choice[0] + s * SIZES[3]
    best, token, is_bad = _scan(logits, SIZES)
    if (is_bad > 0) | (tl.abs(best) == float("inf")):
        tl.store(heard + s, _BROKEN)
        tl.store(slots.live + s, 0)
        return
    if END[0] > 0:
        counter = slots.counter + 4 * s
        zero = tl.zeros((1,), tl.uint32)
        c0, c1 = zero + (tl.load(counter) + place).to(tl.uint32), zero + tl.load(counter + 1).to(tl.uint32)
        c2, c3 = zero + tl.load(counter + 2).to(tl.uint32), zero + tl.load(counter + 3).to(tl.uint32)
        word, _, _, _ = tl.philox(tl.load(choice[1]) | (tl.load(choice[1] + 1) << 32), c0, c1, c2, c3)
        number = tl.sum(word.to(tl.float64)) / 4294967296.0
        token = _draw(logits, best, number, SIZES, END[0])
    tl.store(slots.written + s * SIZES[4] + place, token)
    tl.store(heard + s, token)
    if (token == END[1]) | (place + 1 >= tl.load(slots.limit + s)):
        tl.store(slots.live + s, 0)


@triton.jit
def _note_tokens(heard, slots, tokens, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_live = tl.load(slots.live + s, mask=s < SIZES[0], other=0) != 0
    position = tl.load(slots.position + s, mask=is_live, other=0) + 1
    place = position - tl.load(slots.length + s, mask=is_live, other=0)
    token = tl.load(tokens + s, mask=s < SIZES[0], other=0).to(tl.int32)
    is_due = is_live & (place >= 0)
    writes = is_due & (token >= 0)
    tl.store(slots.position + s, position, mask=is_live)
    tl.store(slots.written + s.to(tl.int64) * SIZES[1] + place, token, mask=writes)
    tl.store(heard + s, tl.where(writes, token, tl.where(is_due, _BROKEN, _NOTHING)), mask=s < SIZES[0])
    is_over = (token < 0) | (token == SIZES[2]) | (place + 1 >= tl.load(slots.limit + s, mask=is_live, other=0))
    tl.store(slots.live + s, 0, mask=is_due & is_over)


@triton.jit
def _admit(slots, entries, SIZES: tl.constexpr, TILE: tl.constexpr):
    entry = entries + tl.program_id(0).to(tl.int64) * SIZES[0]
    s = tl.load(entry).to(tl.int64)
    tl.store(slots.live + s, (tl.load(entry + 1) == _LIVES).to(tl.int32))
    if tl.load(entry + 1) == _STOPS:
        return
    tl.store(slots.position + s, tl.load(entry + 2))
    tl.store(slots.length + s, tl.load(entry + 3))
    tl.store(slots.limit + s, tl.load(entry + 4))
    tl.store(slots.direction + s, tl.load(entry + 5).to(tl.int64))
    tl.store(slots.sign + s, tl.load(entry + 6).to(tl.float32))
    for word in range(4):
        bits = tl.load(entry + _COUNTER + word).to(tl.int64) & 0xFFFFFFFF
        tl.store(slots.counter + 4 * s + word, bits)
    for start in range(0, SIZES[1], TILE):
        columns = start + tl.arange(0, TILE)
        words = tl.load(entry + _NUM_COLUMNS + columns, mask=columns < SIZES[1], other=0)
        tl.store(slots.prompt + s * SIZES[1] + columns, words, mask=columns < SIZES[1])


@triton.jit
def _copy_rows(parts, places, strides, WIDTH: tl.constexpr, TILE: tl.constexpr):
    target, source = parts
    pair = places + 2 * tl.program_id(0)
    start, end, layer = tl.load(pair), tl.load(pair + 1), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * TILE + tl.arange(0, TILE)
    is_there = (columns < WIDTH) & (start >= 0)
    values = tl.load(source + layer * strides[1] + start * WIDTH + columns, mask=is_there, other=0)
    tl.store(target + layer * strides[0] + end * WIDTH + columns, values, mask=columns < WIDTH)
