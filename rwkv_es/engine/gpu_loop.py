"""The token loop around a GPU: the host runs some ticks ahead of what it has heard, and looks for stop strings late.

A row that has ended by its own rules (end token, length) rests at once, on the GPU. Of one that a stop string ends the
host learns a few ticks later; what it wrote meanwhile goes nowhere. Nothing depends on timing: what happens in a tick
follows from what was heard of the ticks before the last few.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rwkv_es.engine.decoding import Completion, GenerationConfig, OnFinished, Rollout, next_shared_prefix
from rwkv_es.engine.memory import most_saved
from rwkv_es.engine.scheduler import Prefix, Request, Scheduler, longest_first
from rwkv_es.engine.stops import distinct
from rwkv_es.gpu.loop_kernels import BROKEN, NOTHING
from rwkv_es.gpu.slots import Engine, Entry, GpuSlots, Part, Sizes, at_once, counts_of, readers_of
from rwkv_es.model.batch import agreeing
from rwkv_es.model.weights import Factors

AHEAD = 2  # ticks under way that the host has not heard of
PATIENCE = 8  # ticks: half of what the tokens would take one by one


class Device(Protocol):
    """Where the ticks are made; see `gpu.slots.GpuSlots`."""

    def read(self, parts: Sequence[Part]) -> None:
        """Let slots at rest read on in their prompts."""

    def tick(self, count: int) -> int:
        """Let the first `count` slots read a token each; return a number by which `listen` knows the tick."""

    def listen(self, tick: int, count: int) -> np.ndarray:
        """Wait for a tick, one of the last ones, and return what its slots have written: (count,) int32."""

    def admit(self, entries: Sequence[Entry], stopped: Sequence[int]) -> None:
        """Let requests enter slots, and the rows of others come to rest."""

    def save(self, places: Sequence[tuple[int, int]]) -> None:
        """Save the states of some slots: (slot, where)."""

    def move(self, places: Sequence[tuple[int, int]]) -> None:
        """Move rows to slots where nobody is: (from, to)."""


def rollout(
    engine: Engine,
    requests: Sequence[Request],
    decoding: GenerationConfig,
    factors: Factors | None,
    on_finished: OnFinished,
) -> Rollout:
    """Generate every request's completion, as `rollout.rollout` does: `requests` know their places in the list."""
    slots = decoding.padded(min(decoding.slots, len(requests)))
    counts = agreeing(engine.model, counts_of(slots, decoding.row_multiple))
    sizes = Sizes(
        slots=slots,
        prompt=max((len(request.prompt) for request in requests), default=0),
        written=max((request.max_new_tokens for request in requests), default=0),
        at_once=at_once(counts),
        saved=most_saved(slots) if any(request.shared_prefixes for request in requests) else 0,
        ahead=AHEAD,
        num_words=len(decoding.stops.can_end),
    )
    device = GpuSlots(engine, factors, sizes, decoding)
    device.prepare(counts, readers_of(counts))
    return Loop(device, requests, decoding, counts).run(on_finished)


class Loop:
    """The host's side: who is in which slot in which tick, and what each row has written."""

    def __init__(
        self, device: Device, requests: Sequence[Request], decoding: GenerationConfig, counts: Sequence[int]
    ) -> None:
        self.device, self.counts, self.requests = device, counts, requests
        self.at_once, self.most_readers = at_once(counts), max(readers_of(counts), default=0)
        num_slots, capacity = min(decoding.slots, len(requests)), max(counts, default=0)
        self.scheduler = Scheduler(longest_first(requests, decoding.slots), num_slots)
        self.stops, self.kind_of = distinct([request.stops for request in requests], decoding.stops)
        self.can_end = np.stack([stops.can_end for stops in self.stops])  # (kinds of stops,V)
        self.end_id = decoding.stops.end_id
        # By slot: the request that is there in the next tick; -1: nobody.
        self.owner = np.full(capacity, -1, np.int64)
        self.free = list(range(capacity))
        self.place: list[int] = []  # of the scheduler's rows, in its order
        # By handle, one per request under way: what it has written.
        self.handles = list(range(num_slots))
        self.written = np.zeros((max(num_slots, 1), max((r.max_new_tokens for r in requests), default=0)), np.int32)
        self.num_written, self.limit, self.kind = np.zeros((3, max(num_slots, 1)), np.int64)
        # By request: its handle and slot, how much of its prompt it had read when it entered, and has now.
        self.handle, self.slot, self.num_shared, self.num_known = np.zeros((4, len(requests)), np.int64)
        self.is_over = np.zeros(len(requests) + 1, bool)
        self.is_over[-1] = True  # nobody
        self.stale: set[int] = set()  # slots whose row the host has ended
        self.saved: dict[Prefix, int] = {}
        self.free_saved = list(range(most_saved(capacity)))
        self.reading: list[int] = []  # requests at rest that have prompts to read, in the order in which they came
        self.patience = PATIENCE  # ticks for which they wait for company
        self.under_way: deque[tuple[int, np.ndarray]] = deque()
        self.count, self.num_ticks, self.num_read = capacity, 0, 0

    def run(self, on_finished: OnFinished) -> Rollout:
        """Generate all completions."""
        done: dict[int, Completion] = {}
        while not self.scheduler.is_done:
            self.admit()
            self.shrink()
            if self.read_prompts():
                continue
            self.launch()
            ended = self.listen() if len(self.under_way) > AHEAD else {}
            done.update(ended)
            on_finished(ended)
        return Rollout([done[i] for i in range(len(self.requests))], self.num_ticks, self.num_read)

    def admit(self) -> None:
        """Let requests enter free slots; rows that a stop string has ended come to rest unless a request follows."""
        entries = [self._enter(request, prefix) for _, request, prefix in self.scheduler.schedule()]
        stopped = sorted(self.stale.difference(entry.place for entry in entries))
        self.stale.clear()
        if entries or stopped:
            self.device.admit(entries, stopped)
        for prefix in self.scheduler.release():
            self.free_saved.append(self.saved.pop(prefix))

    def shrink(self) -> None:
        """If nobody waits and few rows are left, go on with the first slots only."""
        fewer = next((count for count in self.counts if count >= len(self.place)), self.count)
        if self.scheduler.num_waiting or fewer >= self.count:
            return
        moves = []
        for i, start in enumerate(self.place):
            if start >= fewer:
                target = heapq.heappop(self.free)
                moves.append((start, target))
                owner, self.owner[start] = int(self.owner[start]), -1
                self.owner[target], self.slot[owner], self.place[i] = owner, target, target
        if moves:
            self.device.move(moves)
        self.count, self.free = fewer, [place for place in self.free if place < fewer]
        heapq.heapify(self.free)

    def launch(self) -> None:
        """Start a tick, and note who is where."""
        tick = self.device.tick(self.count)
        self.under_way.append((tick, self.owner[: self.count].copy()))
        self.num_ticks += 1

    def read_prompts(self) -> bool:
        """Let rows at rest read parts of their prompts if many do, some have waited, or nobody else is there.

        Which part is read at once follows from the request alone: up to the next prefix that is shared, or to the last
        token, which a tick reads.
        """
        if not self.reading or not (
            len(self.reading) >= self.most_readers or not self.patience or len(self.reading) == len(self.place)
        ):
            self.patience -= bool(self.reading)
            return False
        self.patience = PATIENCE
        parts, ends = [], []
        for i in self.reading[: self.most_readers]:
            start, last, shared = int(self.num_known[i]), len(self.requests[i].prompt) - 1, self._next_shared(i)
            count = min(self.at_once, (shared if shared > 0 else last) - start)
            self.num_known[i] += count
            parts.append(Part(int(self.slot[i]), count, start + count == last))
            if start + count == shared:
                ends.append(i)
        self.device.read(parts)
        self.num_ticks += 1
        self._save_prefixes(ends)
        others = self.reading[len(parts) :]
        self.reading = [i for i, part in zip(self.reading, parts) if not part.lives] + others
        return True

    def _next_shared(self, i: int) -> int:
        return next_shared_prefix(self.requests[i], int(self.num_known[i]))

    def _save_prefixes(self, ids: Sequence[int]) -> None:
        """Save the states of rows that have just read what others wait for."""
        places = []
        for i in ids:
            request = self.requests[i]
            prefix = (request.member, request.prompt[: self.num_known[i]])
            if self.scheduler.publish(prefix):
                self.saved[prefix] = self.free_saved.pop()
                places.append((int(self.slot[i]), self.saved[prefix]))
        if places:
            self.device.save(places)

    def listen(self) -> dict[int, Completion]:
        """Take in what the oldest tick under way has written; return the completions that have ended, by request."""
        tick, owner = self.under_way.popleft()
        heard = self.device.listen(tick, len(owner))
        at = np.flatnonzero((heard != NOTHING) & ~self.is_over[owner])
        ids, tokens = owner[at], heard[at]
        handles, is_broken = self.handle[ids], tokens == BROKEN
        self.written[handles, self.num_written[handles]] = tokens  # of a broken row: beyond what it has written
        self.num_written[handles] += ~is_broken
        is_end = tokens == self.end_id
        for i in np.flatnonzero(self.can_end[self.kind[handles], tokens] & ~is_end & ~is_broken):
            is_end[i] = self._hits(handles[i])
        is_over = is_end | is_broken | (self.num_written[handles] >= self.limit[handles])
        if not is_over.any():
            return {}
        finish = np.where(is_broken, "broken", np.where(is_end, "stop", "length"))
        return self._end(dict(zip(ids[is_over].tolist(), finish[is_over].tolist())))

    def _enter(self, request: Request, prefix: Prefix | None) -> Entry:
        i, place, handle = request.id, heapq.heappop(self.free), self.handles.pop()
        self.place.append(place)
        self.owner[place], self.slot[i], self.handle[i] = i, place, handle
        self.num_written[handle], self.limit[handle], self.kind[handle] = 0, request.max_new_tokens, self.kind_of[i]
        self.num_shared[i] = self.num_known[i] = len(prefix[1]) if prefix else 0
        if self.num_known[i] < len(request.prompt) - 1:
            self.reading.append(i)
        return Entry(place, request, int(self.num_shared[i]), self.saved[prefix] if prefix else -1)

    def _hits(self, handle: int) -> bool:
        """Say whether the last token of a row completes a stop string."""
        stops, written = self.stops[self.kind[handle]], self.written[handle, : self.num_written[handle]]
        longest = max(map(len, stops.strings), default=0)
        few = written[-longest:].tolist()  # enough, unless some of them stand for no bytes
        is_enough = sum(len(stops.token_bytes[token]) for token in few[:-1]) >= longest - 1
        return stops.hit(few if is_enough else written.tolist())

    def _end(self, finish: dict[int, str]) -> dict[int, Completion]:
        """Free the slots of requests that have ended and return their completions."""
        found = {}
        for i, how in finish.items():
            handle, request, place = int(self.handle[i]), self.requests[i], int(self.slot[i])
            tokens = self.written[handle, : self.num_written[handle]].tolist()
            found[i] = Completion(tokens, how)
            self.num_read += len(request.prompt) - int(self.num_shared[i]) + len(tokens) - (how != "broken")
            self.is_over[i], self.owner[place] = True, -1
            self.handles.append(handle)
            heapq.heappush(self.free, place)
            if how == "stop" and tokens[-1] != self.end_id:
                self.stale.add(place)  # it goes on writing until it is told
        leavers = [v for v, request in enumerate(self.scheduler.active) if request.id in found]
        self.scheduler.finish(leavers)
        for source, target in self.scheduler.close():
            self.place[target] = self.place[source]
        del self.place[len(self.scheduler.active) :]
        return found
