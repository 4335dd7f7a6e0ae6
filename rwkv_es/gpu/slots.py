"""The slots of the token loop on a GPU: a tick of all of them is one piece of work that the host repeats unseen.

Nothing but tokens comes back, and nothing but requests goes there. A tick reads and writes at fixed addresses.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rwkv_es.gpu import loop_kernels as kernels
from rwkv_es.gpu.operands import Reading, Texts
from rwkv_es.model import penalties
from rwkv_es.model.batch import MULTIPLES, padded
from rwkv_es.model.forward import Model, State, new_state, reset_rows_, unperturbed
from rwkv_es.model.sampler import largest, sample
from rwkv_es.model.weights import Factors, Weights
from rwkv_es.noise.factors import hash_key

if TYPE_CHECKING:
    from rwkv_es.engine.decoding import GenerationConfig
    from rwkv_es.engine.scheduler import Request

AT_ONCE = 16  # tokens of a prompt that a row reads in one go
_PARTS = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # of the slots: the numbers of rows that ticks are made for
_FEWEST = 64

Work = Callable[[], None]


class Engine(Protocol):
    """What computes a tick: `gpu.GpuEngine`."""

    model: Model
    live: Tensor  # (S,) int32: the rows to be computed
    capture: Callable[[Work], Work] | None

    def read_(self, weights: Weights, tokens: Tensor, state: State) -> Tensor:
        """Read one token per row, in place: (S,) int64 -> (S,C)."""

    def read_texts_(self, weights: Weights, reading: Reading, state: State) -> None:
        """Read several tokens of each of some rows, into the states of their slots."""

    def logits(self, weights: Weights, x: Tensor) -> Tensor:
        """Apply the LM head: (S,C) -> (S,V) fp32."""


class Sizes(NamedTuple):
    """How much room there is."""

    slots: int
    prompt: int  # tokens
    written: int  # tokens
    at_once: int  # tokens of a prompt that are read at once
    saved: int  # states of shared prefixes
    ahead: int  # ticks that are under way at a time
    num_words: int  # of the vocabulary that may be sampled


class Entry(NamedTuple):
    """A request that enters a slot, having read so many tokens: their state was saved at `saved`; -1: none was."""

    place: int
    request: "Request"
    num_read: int
    saved: int


class Part(NamedTuple):
    """What a slot reads at once of its prompt, and whether it takes part in the ticks afterwards."""

    place: int
    num_tokens: int
    lives: bool


def counts_of(slots: int, multiple: int) -> list[int]:
    """Return the numbers of rows that ticks are made for, ascending: as rows end and nobody waits, fewer are enough."""
    parts = {padded(int(part * slots), multiple) for part in _PARTS}
    return sorted(count for count in parts | {padded(_FEWEST, multiple), slots} if 0 < count <= slots)


def at_once(counts: Sequence[int]) -> int:
    """Return how many tokens of a prompt are read at once, so that all rows' tokens are a number of rows of a tick."""
    return AT_ONCE if any(count % AT_ONCE == 0 for count in counts) else MULTIPLES[0]


def readers_of(counts: Sequence[int]) -> list[int]:
    """Return in how many rows prompts may be read at a time, ascending: products see as many rows as in a tick."""
    return [count // at_once(counts) for count in counts if count % at_once(counts) == 0]


class GpuSlots:
    """What is in the slots, and the ticks that go over the first so many of them."""

    def __init__(self, engine: Engine, factors: Factors | None, sizes: Sizes, decoding: "GenerationConfig") -> None:
        model = engine.model
        device, like = model.like.device, model.like
        self.engine, self.factors, self.sizes = engine, factors, sizes
        self.sampling, self.end_id = decoding.sampling, decoding.stops.end_id
        self.state, self.saved = new_state(model, sizes.slots), new_state(model, max(sizes.saved, 1))

        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(sizes.slots, *shape, dtype=dtype, device=device)

        self.slots = kernels.Slots(
            live=engine.live[: sizes.slots],
            position=numbers(),
            length=numbers(),
            limit=numbers(),
            direction=numbers(dtype=torch.int64),
            sign=numbers(dtype=like.dtype),
            counter=numbers(4, dtype=torch.int64),
            prompt=numbers(max(sizes.prompt, 1)),
            written=numbers(max(sizes.written, 1)),
        )
        self.tokens, self.heard = numbers(dtype=torch.int64), numbers()
        # What is read at once: every token is a row. Parts come as (R,3), as many as there may be.
        texts = Texts(numbers(dtype=torch.int64), numbers())
        self.reading = Reading(texts, self.tokens, numbers(dtype=torch.int64), numbers(dtype=like.dtype), numbers())
        self.parts = numbers(3)
        self.key = torch.tensor(hash_key("sampling", self.sampling.seed), device=device)
        self.penalises = self.sampling.has_penalties
        self.amounts = penalties.counted(decoding.stops.token_bytes if self.penalises else (), device)
        self.occurrence = numbers(max(sizes.written, 1) if self.penalises else 0, dtype=torch.float64)
        self.has_initial_state = "blocks.0.att.time_state" in model.params
        # By number of rows, or of rows that read several tokens: what is repeated, and what holds its memory.
        self.ticks: dict[int, tuple[Work, Work]] = {}
        self.readers: dict[int, tuple[Work, Work]] = {}
        is_gpu = device.type == "cuda"
        self.ring = [torch.empty(sizes.slots, dtype=torch.int32, pin_memory=is_gpu) for _ in range(sizes.ahead + 1)]
        self.events = [torch.cuda.Event() if is_gpu else None for _ in self.ring]
        self.num_ticks = 0
        self.slots.live.zero_()

    def prepare(self, counts: Sequence[int], readers: Sequence[int]) -> None:
        """Make ready the ticks over so many rows, and the reading of parts in so many rows.

        Nobody is there yet, so that trying them changes nothing.
        """
        self.ticks = {n: self._repeatable(partial(self._tick, n, self._weights(slice(n)))) for n in counts}
        self.readers = {n: self._repeatable(partial(self._read, self._seen(n), self.parts[:n])) for n in readers}

    def _repeatable(self, work: Work) -> tuple[Work, Work]:
        if self.engine.capture is None:
            return work, work
        work()  # compiles what it needs
        return self.engine.capture(work), work

    def tick(self, count: int) -> int:
        """Let the first `count` slots read a token each; return a number by which `listen` knows the tick."""
        self.ticks[count][0]()
        place = self.num_ticks % len(self.ring)
        self.ring[place][:count].copy_(self.heard[:count], non_blocking=True)
        if (event := self.events[place]) is not None:
            event.record()
        self.num_ticks += 1
        return self.num_ticks - 1

    def read(self, parts: Sequence[Part]) -> None:
        """Let slots at rest read on in their prompts."""
        rows = min(rows for rows in self.readers if rows >= len(parts))
        table = np.zeros((rows, 3), np.int32)
        table[: len(parts)] = np.array(parts)
        self.parts[:rows].copy_(self._sent(table), non_blocking=True)
        self.readers[rows][0]()

    def listen(self, tick: int, count: int) -> np.ndarray:
        """Wait for a tick, one of the last ones, and return what its slots have written: (count,) int32."""
        place = tick % len(self.ring)
        if (event := self.events[place]) is not None:
            event.synchronize()
        return self.ring[place][:count].numpy()

    def admit(self, entries: Sequence[Entry], stopped: Sequence[int]) -> None:
        """Let requests enter slots, and the rows of others come to rest."""
        if entries or stopped:
            kernels.admit(self.slots, self._sent(columns(entries, stopped, self.slots.prompt.shape[1], self.factors)))
        if not entries:
            return
        saved = [(entry.saved, entry.place) for entry in entries]
        self._copy(self.state, self.saved, saved)
        fresh = [place for source, place in saved if source < 0]
        if self.has_initial_state and fresh:
            rows = self._sent(np.array(fresh, np.int64))
            reset_rows_(self.state, self._weights(rows), rows)

    def save(self, places: Sequence[tuple[int, int]]) -> None:
        """Save the states of some slots: (slot, where)."""
        self._copy(self.saved, self.state, places)

    def move(self, places: Sequence[tuple[int, int]]) -> None:
        """Move rows to slots where nobody is: (from, to)."""
        self._copy(self.state, self.state, places)
        pairs = self._sent(np.array(places, np.int64))
        for column in (*self.slots, self.occurrence):
            column[pairs[:, 1]] = column[pairs[:, 0]]
        self.slots.live[pairs[:, 0]] = 0

    def _tick(self, count: int, weights: Weights) -> None:
        slots = kernels.Slots(*(column[:count] for column in self.slots))
        kernels.choose_tokens(self.tokens[:count], slots)
        x = self.engine.read_(weights, self.tokens[:count], self.state.rows(slice(count)))
        scores, heard = self.engine.logits(weights, x), self.heard[:count]
        choice = kernels.Choice(scores, self.key, self.sizes.num_words, self.sampling.temperature, self.end_id)
        if self.penalises:
            text = self._text(slots)
            penalties.penalise_(scores, text, self.sampling)
        if self.sampling.is_cut:
            kernels.note_tokens(heard, slots, self._sampled(scores[:, : self.sizes.num_words], slots), choice)
        else:
            kernels.write_tokens(heard, slots, choice)
        if self.penalises:
            penalties.note_(text, heard, self.amounts, self.sampling)

    def _seen(self, rows: int) -> Reading:
        """Return the buffers for so many rows that read at once."""
        texts, *by_token = self.reading
        num_tokens = rows * self.sizes.at_once
        return Reading(Texts(*(part[:rows] for part in texts)), *(part[:num_tokens] for part in by_token))

    def _read(self, reading: Reading, parts: Tensor) -> None:
        kernels.choose_texts(reading, self.slots, parts)
        weights = self._weights(slice(None))
        if weights.direction is not None:
            weights = weights._replace(direction=reading.direction, sign=reading.sign)
        self.engine.read_texts_(weights, reading, self.state)

    def _text(self, slots: kernels.Slots) -> penalties.Text:
        """Return what the slots have written before this tick's token."""
        count = (slots.position + 1 - slots.length).clamp_(min=0).long()
        return penalties.Text(slots.written, count, self.occurrence[: len(count)])

    def _sampled(self, scores: Tensor, slots: kernels.Slots) -> Tensor:
        """Choose a token for every row (S,V), due or not: (S,); -1: the logits are not finite."""
        counter = slots.counter.clone()
        counter[:, 0] += (slots.position + 1 - slots.length).clamp_(min=0)
        tokens = sample(scores, self.sampling, counter)
        return torch.where(torch.isfinite(largest(scores, tokens, self.sampling)), tokens, -1)

    def _weights(self, rows: slice | Tensor) -> Weights:
        model = self.engine.model
        weights = unperturbed(model)
        if self.factors is None:
            return weights
        return weights._replace(factors=self.factors, direction=self.slots.direction, sign=self.slots.sign).rows(rows)

    def _copy(self, target: State, source: State, places: Sequence[tuple[int, int]]) -> None:
        pairs = self._sent(np.array(places, np.int64))
        for part, other in zip(target, source):
            kernels.copy_rows(part, other, pairs)

    def _sent(self, values: np.ndarray) -> Tensor:
        """Copy numbers to the device; it need not wait for them."""
        tensor: Any = torch.from_numpy(values)
        device = self.engine.model.like.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def columns(entries: Sequence[Entry], stopped: Sequence[int], longest: int, factors: Factors | None) -> np.ndarray:
    """Return what `loop_kernels.admit` reads: (n,NUM_COLUMNS + longest) int32."""
    found = np.zeros((len(entries) + len(stopped), kernels.NUM_COLUMNS + longest), np.int64)
    for row, (place, request, num_read, _) in zip(found, entries):
        how = kernels.LIVES if num_read + 1 >= len(request.prompt) else kernels.RESTS  # a tick reads the last token
        direction = 0 if factors is None else request.member // 2 - factors.first
        assert factors is None or 0 <= direction < factors.num_directions, f"no factors of {request.member}"
        sizes, sign = (num_read, len(request.prompt), request.max_new_tokens), 1 - 2 * (request.member % 2)
        row[: kernels.NUM_COLUMNS] = (place, how, *sizes, direction, sign, *request.counter)
        row[kernels.NUM_COLUMNS : kernels.NUM_COLUMNS + len(request.prompt)] = request.prompt
    found[len(entries) :, kernels.PLACE] = stopped
    return found.astype(np.uint32).view(np.int32)
