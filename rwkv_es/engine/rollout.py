"""The token loop: every tick, each active row reads one token; rows past their prompt sample the next one."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rwkv_es.engine.decoding import (
    Completion,
    GenerationConfig,
    OnFinished,
    Partner,
    Rollout,
    joined,
    next_shared_prefix,
    refuse_too_much,
)
from rwkv_es.engine.engines import Engine, engine_of
from rwkv_es.engine.memory import most_saved, most_under_way
from rwkv_es.engine.scheduler import Admission, Move, Prefix, Request, Scheduler, longest_first
from rwkv_es.engine.stops import distinct
from rwkv_es.gpu import engine as gpu
from rwkv_es.model.forward import Model, new_state, perturb, reset_rows_, unperturbed
from rwkv_es.model.penalties import penalties_of
from rwkv_es.model.sampler import largest, sample
from rwkv_es.model.weights import Factors, Weights
from rwkv_es.system.errors import ConfigError

FEW_ROWS = 16  # measured: from some 32 rows on, reading token by token, all rows together, is as fast
MOST_AHEAD = 256  # tokens


def rollout(
    model: Model,
    requests: Sequence[Request],
    decoding: GenerationConfig,
    factors: Factors | None = None,
    on_finished: OnFinished = lambda ended: None,
    *,
    partner: Partner | None = None,
) -> Rollout:
    """Generate every request's completion. The same request gets the same tokens in any slot, order and company.

    A request that ends may go on with what its `partner` replies: its state waits meanwhile, and then enters any slot.
    `factors` must hold the directions of all members among the requests; None: the unperturbed model.

    Raises:
        ConfigError: the engine cannot be used, or a request has more tokens or samples than there is noise for.
    """
    refuse_too_much(requests)
    requests = [request._replace(id=i) for i, request in enumerate(requests)]
    scheduler = Scheduler(longest_first(requests, decoding.slots), min(decoding.slots, len(requests)))
    done: dict[int, Completion] = {}
    num_ticks = num_read = 0
    with engine_of(model, decoding._replace(slots=scheduler.num_slots), factors) as engine:
        if isinstance(engine, gpu.GpuEngine):
            from rwkv_es.engine import gpu_loop  # and Triton

            if partner is not None:
                raise ConfigError("on a GPU, tasks with an environment need --engine torch: triton's loop has no turns")
            return gpu_loop.rollout(engine, requests, decoding, factors, on_finished)
        rows = _Rows(model, requests, decoding, factors, has_turns=partner is not None)
        while not scheduler.is_done:
            rows.admit(scheduler.schedule())
            rows.move(scheduler.close())
            rows.drop(scheduler.release())
            num_active = len(scheduler.active)
            ended: dict[int, Completion] = {}
            if num_active:
                num_read += rows.read_ahead(engine, num_active)
                num_ticks, num_read = num_ticks + 1, num_read + num_active
                rows.tick(engine, num_active)
                rows.save_prefixes(scheduler)
                finished = rows.finished(num_active)
                ended = {scheduler.active[slot].id: completion for slot, completion in finished.items()}
                paused = partner.answered(ended) if partner else ()
                rows.keep({slot: i for slot in finished if (i := scheduler.active[slot].id) in paused})
                scheduler.finish(finished, paused)
                done.update({i: joined(done.get(i), completion) for i, completion in ended.items()})
                ended = {i: done[i] for i in ended if i not in paused}
            replies = partner.replies(wait=not scheduler.num_ready) if partner else {}
            for i, request in replies.items():
                if scheduler.resume(i, request):
                    rows.drop([i])
                    ended[i] = done[i]
            on_finished(ended)
    return Rollout([done[i] for i in range(len(requests))], num_ticks, num_read)


class _Rows:
    """What is in the slots: the text that each row reads and writes, and its recurrent state."""

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        decoding: GenerationConfig,
        factors: Factors | None,
        *,
        has_turns: bool,
    ) -> None:
        self.model, self.decoding, self.factors = model, decoding, factors
        num_slots = min(decoding.slots, len(requests))
        capacity, num_kept = decoding.padded(num_slots), min(len(requests), most_under_way(num_slots)) * has_turns
        num_kept += most_saved(num_slots) * any(request.shared_prefixes for request in requests)
        self.state, self.kept = new_state(model, capacity), new_state(model, num_kept)
        self.kept_of: dict[Prefix | int, int] = {}  # read prefixes and ids of requests that wait -> rows of `kept`
        self.free = list(range(num_kept))  # rows of it
        # Padding rows need a member whose factors are there: any.
        member = requests[0].member if requests else -1
        self.member = torch.full((capacity,), member, dtype=torch.int64, device=self.state.wkv.device)
        self.prompt = np.zeros((capacity, max((len(r.prompt) for r in requests), default=0)), np.int64)
        self.written = np.zeros((capacity, max((r.max_new_tokens for r in requests), default=0)), np.int64)
        self.num_prompt, self.num_read, self.num_written, self.most, self.next_shared_prefix = np.zeros(
            (5, capacity), np.int64
        )
        self.counter = np.zeros((capacity, 4), np.int64)
        self.stops, self.stops_of = distinct([request.stops for request in requests], decoding.stops)
        self.can_end = np.stack([stops.can_end for stops in self.stops])  # (kinds of stops,V)
        self.kind = np.zeros(capacity, np.int64)  # of stops
        self.is_broken = np.zeros(capacity, bool)
        token_bytes, device = decoding.stops.token_bytes, self.member.device
        self.penalties = penalties_of(decoding.sampling, token_bytes, self.written.shape, device)
        self.weights = self._weights()

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Put requests into their slots; their states start empty, as kept of their prefix, or as they were."""
        if not admissions:
            return
        self._widen(max(len(admission.request.prompt) for admission in admissions))
        self._place(admissions)
        self.weights = self._weights()
        kept = [self.kept_of.get(request.id if prefix is None else prefix, -1) for _, request, prefix in admissions]
        new = self._index([admission.slot for admission, row in zip(admissions, kept) if row < 0])
        if len(new):
            reset_rows_(self.state, self.weights.rows(new), new)
        others = self._index([admission.slot for admission, row in zip(admissions, kept) if row >= 0])
        if len(others):
            self.state.copy_rows_(others, self.kept, self._index([row for row in kept if row >= 0]))
            self.drop([request.id for _, request, _ in admissions if request.id in self.kept_of])

    def read_ahead(self, engine: Engine, num_active: int) -> int:
        """If only a few rows are active, let each read many tokens of its prompt at once, up to what a tick ends.

        The bits are those of token by token, the products larger. Returns the number of tokens read.
        """
        if num_active > FEW_ROWS or not engine.can_read_ahead or self.member.device.type != "cpu":
            return 0
        next_stop = np.where(self.next_shared_prefix < 0, self.num_prompt, self.next_shared_prefix)[:num_active]
        ahead = np.minimum(next_stop - self.num_read[:num_active] - 1, MOST_AHEAD)
        counts = ahead // self.decoding.row_multiple * self.decoding.row_multiple
        for slot in np.flatnonzero(counts > 0):
            first, count = self.num_read[slot], int(counts[slot])
            tokens = self._index(self.prompt[slot, first : first + count])
            weights = self.weights.rows(torch.full((count,), int(slot), device=self.member.device))
            engine.forward(weights, self.model.arch, tokens, self.state.rows(slice(int(slot), int(slot) + 1)))
            self.num_read[slot] += count
        return int(counts[counts > 0].sum())

    def tick(self, engine: Engine, num_active: int) -> None:
        """Read one token per row; sample one for each row that has read its prompt."""
        rows_read = slice(self.decoding.padded(num_active))
        in_prompt = self.num_read < self.num_prompt
        rows = np.arange(len(in_prompt))
        last_written = self.written[rows, np.maximum(self.num_written, 1) - 1]
        tokens = np.where(in_prompt, self.prompt[rows, np.minimum(self.num_read, self.num_prompt - 1)], last_written)
        weights, state = self.weights.rows(rows_read), self.state.rows(rows_read)
        x = engine.forward(weights, self.model.arch, self._index(tokens[rows_read]), state)
        self.num_read[:num_active] += 1
        self._sample(engine, x, np.flatnonzero(self.num_read[:num_active] >= self.num_prompt[:num_active]))

    def finished(self, num_active: int) -> dict[int, Completion]:
        """Return the completions of the rows that have ended, by slot."""
        count, kind = self.num_written[:num_active], self.kind[:num_active]
        last = self.written[np.arange(num_active), np.maximum(count, 1) - 1]
        is_end = (count > 0) & (last == self.decoding.stops.end_id)
        for slot in np.flatnonzero((count > 0) & self.can_end[kind, last] & ~is_end):
            is_end[slot] = self.stops[kind[slot]].hit(self.written[slot, : count[slot]].tolist())
        is_broken, found = self.is_broken[:num_active], {}
        for slot in np.flatnonzero(is_broken | is_end | (count >= self.most[:num_active])).tolist():
            finish = "broken" if is_broken[slot] else "stop" if is_end[slot] else "length"
            found[slot] = Completion(self.written[slot, : count[slot]].tolist(), finish)
        return found

    def save_prefixes(self, scheduler: Scheduler) -> None:
        """Save the state of every row that has just read a prefix which others wait for."""
        num_active, found = len(scheduler.active), dict[int, Prefix]()
        for slot in np.flatnonzero(self.num_read[:num_active] == self.next_shared_prefix[:num_active]).tolist():
            request, length = scheduler.active[slot], int(self.num_read[slot])
            prefix = (request.member, request.prompt[:length])
            if scheduler.publish(prefix):
                found[slot] = prefix
            self.next_shared_prefix[slot] = next_shared_prefix(request, length)
        self.keep(found)

    def keep(self, slots: Mapping[int, Prefix] | Mapping[int, int]) -> None:
        """Copy the states of some slots aside, by the name under which they will be wanted."""
        if slots:
            rows = [self.free.pop() for _ in slots]
            self.kept_of.update(zip(slots.values(), rows))
            self.kept.copy_rows_(self._index(rows), self.state, self._index(list(slots)))

    def drop(self, names: Sequence[Prefix] | Sequence[int]) -> None:
        """Forget what was kept under some names."""
        self.free.extend(self.kept_of.pop(name) for name in names)

    def move(self, moves: Sequence[Move]) -> None:
        """Move rows to other slots."""
        if not moves:
            return
        source, target = (np.array(slots) for slots in zip(*moves))
        for column in self._columns():
            column[target] = column[source]
        to, start = self._index(target), self._index(source)
        self.state.copy_rows_(to, self.state, start)
        self.member[to] = self.member[start]
        if self.penalties is not None:
            self.penalties.move(to, start)
        self.weights = self._weights()

    def _widen(self, length: int) -> None:
        """Make room for a prompt that is longer than all of before: a reply."""
        if (more := length - self.prompt.shape[1]) > 0:
            self.prompt = np.pad(self.prompt, ((0, 0), (0, more)))

    def _place(self, admissions: Sequence[Admission]) -> None:
        places, requests = [admission.slot for admission in admissions], [each.request for each in admissions]
        for slot, request in zip(places, requests):
            self.prompt[slot, : len(request.prompt)] = request.prompt
            if self.penalties is not None:
                self.penalties.start_(slot)
            if self.factors is not None:  # the kernels look it up without asking again
                assert 0 <= request.member // 2 - self.factors.first < self.factors.num_directions, (
                    f"no factors of {request.member}"
                )
        num_read = [len(prefix[1]) if prefix else 0 for _, _, prefix in admissions]
        self.num_prompt[places], self.num_read[places] = [len(request.prompt) for request in requests], num_read
        self.num_written[places], self.most[places] = 0, [request.max_new_tokens for request in requests]
        self.next_shared_prefix[places] = [next_shared_prefix(*each) for each in zip(requests, num_read)]
        self.kind[places], self.is_broken[places] = [self.stops_of[request.id] for request in requests], False
        self.counter[places] = [request.counter for request in requests]
        self.member[self._index(places)] = self._index([request.member for request in requests])

    def _sample(self, engine: Engine, x: Tensor, rows: np.ndarray) -> None:
        """Sample the next token of `rows` from the hidden x (S,C)."""
        if not rows.size:
            return
        whole = self._index(np.resize(rows, self.decoding.padded(len(rows))))  # repeats rows up to a full multiple
        scores = engine.logits(self.weights.rows(whole), x[whole])[: len(rows), : self.can_end.shape[1]]
        if self.penalties is not None:
            self.penalties.penalise_(scores, self._index(rows))
        counter = self.counter[rows]
        counter[:, 0] += self.num_written[rows]
        tokens = sample(scores, self.decoding.sampling, self._index(counter))
        self.is_broken[rows] = ~torch.isfinite(largest(scores, tokens, self.decoding.sampling)).cpu().numpy()
        rows, tokens = rows[~self.is_broken[rows]], tokens.cpu().numpy()[~self.is_broken[rows]]
        if self.penalties is not None:
            self.penalties.note_(self._index(rows), self._index(tokens))
        self.written[rows, self.num_written[rows]] = tokens
        self.num_written[rows] += 1

    def _weights(self) -> Weights:
        return unperturbed(self.model) if self.factors is None else perturb(self.model, self.factors, self.member)

    def _columns(self) -> tuple[np.ndarray, ...]:
        counts = (
            self.num_prompt,
            self.num_read,
            self.num_written,
            self.most,
            self.next_shared_prefix,
            self.kind,
            self.is_broken,
        )
        return self.prompt, self.written, self.counter, *counts

    def _index(self, values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self.member.device, non_blocking=True)
