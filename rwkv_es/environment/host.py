"""The process that hosts a task's environments in children of its own: each holds many, and runs one at a time.

A child that hangs or ends costs the episode that it was at. The others that it held begin anew elsewhere, and hear all
their answers again: an environment is a function of its problem and of what it was told. While children are busy and
somebody waits, more of them are made.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rwkv_es.environment.children import QUICK_S, Child, Play, Staging, is_crowded, reaped
from rwkv_es.environment.play import Answer, Said, failed, play
from rwkv_es.reward.sheet import TRIES
from rwkv_es.system.errors import RwkvEsError, cause
from rwkv_es.system.isolation import adopt_orphans, die_with_parent, end_processes, guard, isolate, limit_memory
from rwkv_es.system.streams import make_unfailing
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.task import Problem

# Children per worker of the options: those made whatever the machine does, and if it has processors to spare.
CHILDREN, MOST_CHILDREN = 128, 512
_BATCH = 16  # new episodes for a child that answers quickly
_LOOK_S, _RETRY_S = 0.05, 1.0

# Episode; its problem, if the host does not know it; the answers that it has not heard, None: forget it.
Ask = tuple[int, Problem | None, list[Answer] | None]


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
        self.children: list[Child] = []
        self.waiting: deque[int] = deque()  # episodes with an answer, and without a child
        self.found: list[tuple[int, Said]] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(parent, selectors.EVENT_READ)
        self.next_look = self.next_growth = 0.0
        self.is_crowded = False

    def run(self) -> None:
        """Go on until the parent is gone."""
        while True:
            is_busy = any(child.pending for child in self.children)
            for key, _ in self.selector.select(QUICK_S if self.waiting else _LOOK_S if is_busy else None):
                if key.data is None:
                    self.take(pickle.loads(self.parent.recv_bytes()))
                else:
                    self.receive(key.data)
            if time.monotonic() >= self.next_look:
                self.look_after()
            self.hand_out()
            if self.found:
                self.parent.send_bytes(pickle.dumps(self.found))
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
            episode, said, seconds = pickle.loads(child.connection.recv_bytes())
            assert episode == child.pending.popleft(), "answers are taken in order"
            child.last_s, child.is_quick = seconds, seconds < QUICK_S
            self.note(child, episode, Said(*said))
            child.start_clock(self.plays, self.staging)
        except (EOFError, OSError):
            self.lose(child, "the environment ended its process")

    def note(self, child: Child, episode: int, said: Said) -> None:
        """Report what an environment said, unless the episode is forgotten."""
        if (play := self.plays.get(episode)) is None:
            return
        play.child, play.spent_s = child, play.spent_s + time.monotonic() - child.since
        child.held.add(episode)
        self.found.append((episode, said))
        if said.is_over:
            del self.plays[episode]
            child.held.discard(episode)

    def look_after(self) -> None:
        """End children that take too long; notice those that have ended in silence, and how busy the machine is."""
        self.next_look, self.is_crowded = time.monotonic() + _LOOK_S, is_crowded()
        ended = set(reaped())
        for child in list(self.children):
            child.has_ended |= child.pid in ended
            if child.has_ended and not child.connection.poll():  # what it has started may hold its pipe open
                self.lose(child, "the environment ended its process")
            elif child.is_late():
                said = f"the environment ran over its time limit of {child.limit_s:g} s"
                self.lose(child, said, is_timeout=True)

    def lose(self, child: Child, said: str, *, is_timeout: bool = False) -> None:
        """End a child: the episode that it was at is lost, the others begin anew where there is room."""
        self.children.remove(child)
        self.selector.unregister(child.connection)
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
        idle = [child for child in self.children if not child.pending]
        for child in sorted(idle, key=lambda child: len(child.held)) if self.waiting else idle:
            self.send(child)
        for child in idle:
            if not child.pending:
                if not (self.waiting or self.relieve()):
                    break
                self.send(child)
        while (self.waiting or self.relieve()) and self.may_grow():
            if len(self.children) >= self.staging.workers and not all(child.is_taken() for child in self.children):
                break
            self.grow()

    def may_grow(self) -> bool:
        """Say whether another child may be made."""
        most = self.staging.workers * (CHILDREN if self.is_crowded else MOST_CHILDREN)
        return len(self.children) < most and time.monotonic() >= self.next_growth

    def relieve(self) -> bool:
        """Take an episode from the child that lets it wait longest, if to begin anew elsewhere is quicker."""
        child = max((child for child in self.children if child.waiting), key=Child.backlog_s, default=None)
        if child is None or child.backlog_s() <= self.plays[child.waiting[-1]].spent_s + QUICK_S:
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
            child.send(message)

    def chosen_for(self, child: Child) -> list[int]:
        """Choose what an idle child does next: its own episodes first. One that has not spoken yet gets one."""
        most = _BATCH if child.is_quick and child.last_s else 1
        found = [child.waiting.popleft() for _ in range(min(most, len(child.waiting)))]
        if self.waiting and not (child.is_taken() and self.may_grow()):
            share = min(most, max(1, len(self.waiting) // (2 * len(self.children)))) - len(found)
            found += [self.waiting.popleft() for _ in range(min(share, len(self.waiting)))]
        return [episode for episode in found if episode in self.plays]

    def grow(self) -> None:
        """Make a child and give it something to do. If the system has no room for it, do with what there is.

        Raises:
            OSError: there is none.
        """
        ours, theirs = multiprocessing.Pipe()
        try:
            pid = os.fork()
        except OSError:
            if not self.children:
                raise
            self.next_growth = time.monotonic() + _RETRY_S
            return
        if pid == 0:
            try:
                for other in (self.parent, ours, *(child.connection for child in self.children)):
                    other.close()
                self.selector.close()
                os.setsid()  # it leads a group: what it starts ends with it
                die_with_parent()
                limit_memory(self.staging.bounds.memory_bytes)
                play(theirs, self.environment, self.staging.most_chars)
            finally:
                os._exit(0)
        theirs.close()
        child = Child(pid, ours, is_quick=not self.children or any(child.is_quick for child in self.children))
        self.children.append(child)
        self.selector.register(ours, selectors.EVENT_READ, child)
        self.send(child)
