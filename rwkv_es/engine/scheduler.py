"""Who is in which slot: a waiting line, slots that are refilled at once, and prefixes that are read only once."""

from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from rwkv_es.config.option import MOST_NEW
from rwkv_es.engine.memory import most_saved, most_under_way
from rwkv_es.engine.stops import Stops

_SAMPLE_SHIFT = MOST_NEW.bit_length() - 1  # noise counter word 0 = position + sample << 20
Prefix = tuple[int, tuple[int, ...]]  # (member, tokens): what a saved state has read


class Request(NamedTuple):
    """One completion to generate. Sampling's noise is a function of (step, member pair, problem, sample, position)."""

    member: int  # -1: the unperturbed model
    problem: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    sample: int = 0
    step: int = 0
    shared_prefixes: tuple[
        int, ...
    ] = ()  # lengths of prompt prefixes shared with other requests of this member, ascending
    stops: Stops | None = None  # where it ends; None: the decoding's
    id: int = -1  # its place in the list of requests; `rollout` sets it
    position: int = 0  # tokens sampled in earlier turns

    @property
    def counter(self) -> tuple[int, int, int, int]:
        """The counter of the noise by which its first token is sampled; word 0 counts the tokens."""
        pair = self.member // 2 & 0xFFFFFFFF  # the unperturbed model has a number of its own
        return (self.sample << _SAMPLE_SHIFT) + self.position, self.problem, pair, self.step


class Admission(NamedTuple):
    """A request enters a slot, from the state saved for `prefix` or from the start of the text (None)."""

    slot: int
    request: Request
    prefix: Prefix | None


class Move(NamedTuple):
    """The row in slot `source` now lives in slot `target`."""

    source: int
    target: int


class Scheduler:
    """Active slots are always the first ones: a leaver's place is taken by the next request, or by a row from the end.

    A prefix wanted by several requests is read by the first of them; the others wait until `publish` says that its
    state was saved, then start from there. No more than `memory.most_saved` are saved or being read for others at a
    time: where there is no room, a request reads all of its prompt by itself. A request that waits for its next turn is
    in no slot; with those in slots there are no more of them than `memory.most_under_way`. Nothing here depends on
    timing: the same calls give the same order.
    """

    def __init__(self, requests: Sequence[Request], num_slots: int) -> None:
        self.num_slots = num_slots
        self.active: list[Request] = []
        self._gaps: list[int] = []  # among the active slots: emptied, and neither filled nor closed; the first one last
        self._requests = list(requests)
        self._unserved = set(range(len(requests)))
        self._line = deque(range(len(requests)))
        self._ready: deque[int] = deque()  # all that they share is saved: they go first
        self._wanted = Counter(prefix for request in requests for prefix in prefixes(request))
        self._sharing: dict[Prefix, list[int]] = {}  # longest prefix -> who starts from it
        for i, request in enumerate(requests):
            for prefix in prefixes(request)[-1:]:
                self._sharing.setdefault(prefix, []).append(i)
        self._reading: dict[Prefix, list[int]] = {}  # prefix -> who waits for it
        self._saved: set[Prefix] = set()
        self._unused: list[Prefix] = []  # saved, and nobody is left who could start from it
        self._most_saved = most_saved(num_slots)
        self._paused: dict[int, Request] = {}  # by id
        self._resumed: deque[Request] = deque()

    @property
    def is_done(self) -> bool:
        """Say whether nobody is active and nobody waits."""
        return not (self._num_active or self._unserved or self._paused or self._resumed)

    @property
    def num_waiting(self) -> int:
        """Count the requests that have not entered a slot."""
        return len(self._unserved)

    @property
    def num_ready(self) -> int:
        """Count the requests that are in a slot or may enter one."""
        has_room = len(self._paused) < most_under_way(self.num_slots)
        return self._num_active + len(self._resumed) + (len(self._unserved) if has_room else 0)

    def schedule(self) -> list[Admission]:
        """Fill the free slots: first with those who have nothing more to share, then in the order of the line."""
        admissions = []
        while self._resumed and self._num_active < self.num_slots:
            admissions.append(self._enter(self._resumed.popleft(), None))
        while self._has_room and (self._ready or self._line):
            i = (self._ready or self._line).popleft()
            if i not in self._unserved:
                continue
            request = self._requests[i]
            known = self._longest_known(request)
            if known in self._reading:
                self._reading[known].append(i)
                continue
            admissions.append(self._enter(request, known))
            self._unserved.remove(i)
            self._start_reading(request, known)
        return admissions

    @property
    def _num_active(self) -> int:
        return len(self.active) - len(self._gaps)

    @property
    def _has_room(self) -> bool:
        num_under_way = self._num_active + len(self._paused) + len(self._resumed)
        return self._num_active < self.num_slots and num_under_way < most_under_way(self.num_slots)

    def _enter(self, request: Request, prefix: Prefix | None) -> Admission:
        slot = self._gaps.pop() if self._gaps else len(self.active)
        self.active[slot : slot + 1] = [request]
        return Admission(slot, request, prefix)

    def resume(self, request_id: int, request: Request | None) -> bool:
        """Let a request that was paused go on, if it does (None: not); say whether it is over now."""
        was_paused = self._paused.pop(request_id, None) is not None
        if request is not None:
            assert was_paused
            self._resumed.append(request._replace(id=request_id))
        return was_paused and request is None

    def publish(self, prefix: Prefix) -> bool:
        """Note that a row has read `prefix`; say whether its state must be saved (somebody will start from it)."""
        if prefix not in self._reading:
            return False
        self._line.extendleft(reversed(self._reading.pop(prefix)))
        self._ready.extend(i for i in self._sharing.get(prefix, ()) if i in self._unserved)
        if not self._wanted[prefix]:
            return False
        self._saved.add(prefix)
        return True

    def finish(self, slots: Collection[int], paused: Collection[int] = ()) -> None:
        """Empty `slots`, for a while if a request is `paused`. The next `schedule` fills them."""
        self._gaps = sorted(slots, reverse=True)
        self._paused.update({r.id: r for slot in slots if (r := self.active[slot]).id in paused})

    def close(self) -> list[Move]:
        """Close the gaps that are left with rows from the end. No slot is both a source and a target."""
        empty, self._gaps = set(self._gaps), []
        num_left = len(self.active) - len(empty)
        gaps = sorted(slot for slot in empty if slot < num_left)
        movers = [slot for slot in range(num_left, len(self.active)) if slot not in empty]
        moves = [Move(source, target) for source, target in zip(movers, gaps)]
        for source, target in moves:
            self.active[target] = self.active[source]
        del self.active[num_left:]
        return moves

    def release(self) -> list[Prefix]:
        """Return the saved prefixes that nobody needs any more, and forget them."""
        unused, self._unused = self._unused, []
        self._saved.difference_update(unused)
        return unused

    def _longest_known(self, request: Request) -> Prefix | None:
        for prefix in reversed(prefixes(request)):
            if prefix in self._saved or prefix in self._reading:
                return prefix
        return None

    def _start_reading(self, request: Request, known: Prefix | None) -> None:
        """Count the request off its prefixes, and announce those that it will read for others."""
        for prefix in prefixes(request):
            self._wanted[prefix] -= 1
            if not self._wanted[prefix] and prefix in self._saved:
                self._unused.append(prefix)
            is_longer = known is None or len(prefix[1]) > len(known[1])
            if is_longer and self._wanted[prefix] and len(self._saved) + len(self._reading) < self._most_saved:
                self._reading[prefix] = []


def prefixes(request: Request) -> list[Prefix]:
    """Return the request's shareable prefixes, shortest first."""
    return [(request.member, request.prompt[:length]) for length in request.shared_prefixes]


def longest_first(requests: Sequence[Request], num_slots: int) -> list[Request]:
    """Let the longest of the last `num_slots` requests start first, so that few rows are left at the end, and briefly.

    How long a completion becomes is not known; how long its prompt is says something. The others keep their order, by
    members: what is saved for a member is then soon forgotten.
    """
    first = max(0, len(requests) - num_slots)
    return [*requests[:first], *sorted(requests[first:], key=lambda request: -len(request.prompt))]


def with_shared_prefixes(requests: Sequence[Request], shortest: int = 8) -> list[Request]:
    """Mark what requests of one member share: a header of all their prompts, and the prompt of several samples.

    A prefix stops one token before the prompt's end, since sampling needs the logits of the last token.
    """
    by_member: dict[int, list[Request]] = {}
    for request in requests:
        by_member.setdefault(request.member, []).append(request)
    headers = {member: _common_length([r.prompt for r in group]) for member, group in by_member.items()}
    copies = Counter((request.member, request.prompt) for request in requests)
    marked = []
    for request in requests:
        whole = len(request.prompt) - 1
        lengths = {headers[request.member], whole if copies[request.member, request.prompt] > 1 else 0}
        marked.append(request._replace(shared_prefixes=tuple(sorted(n for n in lengths if shortest <= n <= whole))))
    return marked


def _common_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return the length of the prompts' common prefix (0 for a single prompt)."""
    distinct = list(set(prompts))
    if len(distinct) < 2:
        return 0
    low, high = min(distinct), max(distinct)
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
