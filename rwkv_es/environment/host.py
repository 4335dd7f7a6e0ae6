"""The process that hosts a task's environments in children of its own: each holds many, and runs one at a time.

A child that hangs or ends costs the episode that it was at. The others that it held begin anew elsewhere, and hear all
their answers again: an environment is a function of its problem and of what it was told. While children are busy and
somebody waits, more of them are made.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from rwkv_es.environment.play import Answer, Said, failed, play
from rwkv_es.reward.sheet import TRIES
from rwkv_es.system.errors import RwkvEsError, cause
from rwkv_es.system.isolation import Bounds, adopt_orphans, die_with_parent, end_processes, guard, isolate, limit_memory
from rwkv_es.system.streams import make_unfailing
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.task import Problem

MOST_CHILDREN = 128  # per worker of the options
_BATCH = 16  # new episodes for a child that answers quickly
_QUICK_S, _LOOK_S = 0.005, 0.05

# Episode; its problem, if the host does not know it; the answers that it has not heard, None: forget it.
Ask = tuple[int, Problem | None, list[Answer] | None]


class Staging(NamedTuple):
    """What environments are made of, and how long they may take."""

    task: str
    data: str
    timeout_s: float  # for a reply
    episode_s: float  # for all replies of an episode
    workers: int
    most_chars: int  # of a reply
    bounds: Bounds = Bounds()
    sets: str = ""  # what a model is judged on


@dataclass
class Play:
    """An episode as the host knows it: enough to begin it anew."""

    problem: Problem
    texts: list[Answer] = field(default_factory=list)
    child: "Child | None" = None
    losses: int = 0
    spent_s: float = 0.0


class Child:
    """A process that holds environments; `pending` are the episodes whose answers it was sent."""

    def __init__(self, pid: int, pipe: Connection) -> None:
        self.pid, self.connection = pid, pipe
        self.held: set[int] = set()
        self.waiting: deque[int] = deque()  # episodes of its own with an answer that it was not sent
        self.dropped: list[int] = []  # it holds them for nobody
        self.pending: deque[int] = deque()
        self.since = self.limit_s = self.last_s = 0.0
        self.is_quick = True  # until it shows
        self.has_ended = False

    def start_clock(self, plays: dict[int, Play], staging: Staging) -> None:
        """Start the clock of the first pending answer."""
        self.since = time.monotonic()
        play = plays.get(self.pending[0]) if self.pending else None
        if play is not None:
            num_texts = len(play.texts) if play.child is not self else 1
            self.limit_s = min(staging.timeout_s * num_texts, max(staging.episode_s - play.spent_s, 0.0))

    def backlog_s(self) -> float:
        """Return how long the last of those that wait for it will wait, as far as the past tells."""
        return len(self.waiting) * max(self.last_s, time.monotonic() - self.since if self.pending else 0.0)

    def is_stuck(self) -> bool:
        """Say whether who waits for it may wait for long."""
        return bool(self.pending) and (not self.is_quick or time.monotonic() > self.since + _QUICK_S)

    def is_late(self) -> bool:
        """Say whether the answer that it is at takes too long."""
        return bool(self.pending) and time.monotonic() > self.since + self.limit_s and not self.connection.poll()


def serve(parent: Connection, lifeline: Connection, staging: Staging) -> None:
    """Host environments until the parent hangs up. The first message is why the task cannot be loaded, or ""."""
    make_unfailing()
    isolate(staging.bounds)
    guard(parent, lifeline)
    adopt_orphans()
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # not "spawn", as for this
    try:
        environment = load_tasks(staging.task, staging.data, staging.sets).environment
    except RwkvEsError as error:
        parent.send(str(error))
        return
    except BaseException as error:  # noqa: BLE001  any reason at all is reported to the parent, which raises
        parent.send(cause(error))
        return
    assert environment is not None, "the parent has loaded the task"
    gc.collect()
    gc.freeze()  # so that children share what is there
    parent.send("")
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        Host(parent, environment, staging).run()


class Host:
    """Episodes, and the children that play them."""

    def __init__(self, parent: Connection, environment: Callable[[Problem], Any], staging: Staging) -> None:
        self.parent, self.environment, self.staging = parent, environment, staging
        self.plays: dict[int, Play] = {}
        self.children: dict[Connection, Child] = {}
        self.waiting: deque[int] = deque()  # episodes with an answer, and without a child
        self.found: list[tuple[int, Said]] = []

    def run(self) -> None:
        """Go on until the parent is gone."""
        while True:
            is_busy = any(child.pending for child in self.children.values())
            timeout = _QUICK_S if self.waiting else _LOOK_S if is_busy else None
            for ready in connection.wait([self.parent, *self.children], timeout):
                if ready is self.parent:
                    self.take(self.parent.recv())
                elif (child := self.children.get(ready)) is not None:  # type: ignore[call-overload]
                    self.receive(child)
            self.look_after()
            self.hand_out()
            if self.found:
                self.parent.send(self.found)
                self.found = []

    def take(self, asks: Sequence[Ask]) -> None:
        """Take in answers, and what is to be forgotten."""
        for episode, problem, texts in asks:
            if texts is None:
                self.forget(episode)
                continue
            if problem is not None:
                self.plays[episode] = Play(problem)
            if (play := self.plays.get(episode)) is not None:
                play.texts.extend(texts)
                (self.waiting if play.child is None else play.child.waiting).append(episode)

    def forget(self, episode: int) -> None:
        """End an episode that nobody waits for any more."""
        known = self.plays.pop(episode, None)
        child = known.child if known is not None else None
        if child is not None:
            child.held.discard(episode)
            child.dropped.append(episode)
        waiting = self.waiting if child is None else child.waiting
        with contextlib.suppress(ValueError):
            waiting.remove(episode)

    def receive(self, child: Child) -> None:
        """Take in what a child has said."""
        try:
            while child.connection.poll():
                episode, said = child.connection.recv()
                assert episode == child.pending.popleft(), "answers are taken in order"
                self.note(child, episode, Said(*said))
                child.start_clock(self.plays, self.staging)
        except (EOFError, OSError):
            self.lose(child, "the environment ended its process")

    def note(self, child: Child, episode: int, said: Said) -> None:
        """Report what an environment said, unless the episode is forgotten."""
        seconds = time.monotonic() - child.since
        child.last_s, child.is_quick = seconds, seconds < _QUICK_S
        if (play := self.plays.get(episode)) is None:
            return
        play.child, play.spent_s = child, play.spent_s + seconds
        child.held.add(episode)
        self.found.append((episode, said))
        if said.is_over:
            del self.plays[episode]
            child.held.discard(episode)

    def look_after(self) -> None:
        """End children that take too long; notice those that have ended in silence."""
        ended = set(_reaped())
        for child in list(self.children.values()):
            child.has_ended |= child.pid in ended
            if child.has_ended and not child.connection.poll():  # what it has started may hold its pipe open
                self.lose(child, "the environment ended its process")
            elif child.is_late():
                said = f"the environment ran over its time limit of {child.limit_s:g} s"
                self.lose(child, said, is_timeout=True)

    def lose(self, child: Child, said: str, *, is_timeout: bool = False) -> None:
        """End a child: the episode that it was at is lost, the others begin anew where there is room."""
        del self.children[child.connection]
        end_processes(child.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        child.connection.close()
        for episode in {*child.held, *child.pending}:
            if episode in self.plays:
                self.plays[episode].child = None
        guilty, *others = child.pending or [-1]
        self.waiting.extendleft(reversed([e for e in (*others, *child.waiting) if e in self.plays]))
        play = self.plays.get(guilty)
        if play is None:
            return
        play.losses += 1
        if is_timeout or play.losses >= TRIES:
            del self.plays[guilty]
            self.found.append((guilty, failed(said, said, is_timeout=is_timeout)))
        else:
            self.waiting.appendleft(guilty)

    def hand_out(self) -> None:
        """Send answers to the children that are idle; make more of them where the others are busy for long."""
        for child in list(self.children.values()):
            if not child.pending:
                self.send(child)
        workers = self.staging.workers
        while len(self.children) < MOST_CHILDREN * workers and (self.waiting or self.relieve()):
            if len(self.children) >= workers and not all(child.is_stuck() for child in self.children.values()):
                break
            self.send(self.fork())

    def relieve(self) -> bool:
        """Take an episode from the child that lets it wait longest, if to begin anew elsewhere is quicker."""
        child = max(self.children.values(), key=Child.backlog_s, default=None)
        if child is None or not child.waiting or child.backlog_s() <= self.plays[child.waiting[-1]].spent_s + _QUICK_S:
            return False
        episode = child.waiting.pop()
        self.plays[episode].child = None
        child.held.discard(episode)
        child.dropped.append(episode)
        self.waiting.append(episode)
        return True

    def send(self, child: Child) -> None:
        """Send an idle child what waits for it, and new episodes: one, or some if it is quick."""
        message: list[tuple[int, Problem | None, list[Answer]]] = [(episode, None, []) for episode in child.dropped]
        child.dropped.clear()
        for episode in self.chosen_for(child):
            play = self.plays[episode]
            is_new = play.child is not child
            message.append((episode, play.problem, play.texts) if is_new else (episode, None, play.texts[-1:]))
            child.pending.append(episode)
        if message:
            child.start_clock(self.plays, self.staging)
            with contextlib.suppress(OSError):  # it is gone, which is noticed by itself
                child.connection.send(message)

    def chosen_for(self, child: Child) -> list[int]:
        """Choose what an idle child does next: its own episodes first."""
        most = _BATCH if child.is_quick else 1
        found = [child.waiting.popleft() for _ in range(min(most, len(child.waiting)))]
        if self.waiting or (not found and self.relieve()):
            share = min(most, max(1, len(self.waiting) // (2 * len(self.children)))) - len(found)
            found += [self.waiting.popleft() for _ in range(min(share, len(self.waiting)))]
        return [episode for episode in found if episode in self.plays]

    def fork(self) -> Child:
        """Make a child."""
        ours, theirs = multiprocessing.Pipe()
        if (pid := os.fork()) == 0:
            try:
                for other in (self.parent, ours, *self.children):
                    other.close()
                os.setsid()  # it leads a group: what it starts ends with it
                die_with_parent()
                limit_memory(self.staging.bounds.memory_bytes)
                play(theirs, self.environment, self.staging.most_chars)
            finally:
                os._exit(0)
        theirs.close()
        child = self.children[ours] = Child(pid, ours)
        return child


def _reaped() -> Iterator[int]:
    """Yield the processes that have ended since the last time."""
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            yield pid
