"""The processes that play environments, as their host knows them, and the episodes that they hold."""

import contextlib
import os
import pickle
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from rwkv_es.environment.play import Answer
from rwkv_es.system.isolation import Bounds
from rwkv_es.task.task import Problem

QUICK_S = 0.005
_RUNNING_PER_PROCESSOR = 4


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

    def __init__(self, pid: int, pipe: Connection, *, is_quick: bool) -> None:
        self.pid, self.connection, self.is_quick = pid, pipe, is_quick
        self.held: set[int] = set()
        self.waiting: deque[int] = deque()  # episodes of its own with an answer that it was not sent
        self.dropped: list[int] = []  # it holds them for nobody
        self.pending: deque[int] = deque()
        self.since = self.limit_s = self.last_s = 0.0
        self.has_ended = False

    def send(self, message: list[tuple[int, Problem | None, list[Answer]]]) -> None:
        """Hand episodes over, with their problems if they are new to it, and what they are to hear."""
        with contextlib.suppress(OSError):  # it is gone, which is noticed by itself
            self.connection.send_bytes(pickle.dumps(message))

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

    def is_taken(self) -> bool:
        """Say whether who comes to it may wait for long: now, or whenever others that it holds are at their turn."""
        if not self.is_quick:
            return bool(self.pending or self.held)
        return bool(self.pending) and time.monotonic() > self.since + QUICK_S

    def is_late(self) -> bool:
        """Say whether the answer that it is at takes too long."""
        return bool(self.pending) and time.monotonic() > self.since + self.limit_s and not self.connection.poll()


def reaped() -> Iterator[int]:
    """Yield the processes that have ended since the last time."""
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            yield pid


def is_crowded() -> bool:
    """Say whether several processes want to run for each processor, or if that is not known (it is on Linux)."""
    try:
        running = Path("/proc/loadavg").read_text("ascii").split()[3].partition("/")[0]
    except OSError:
        return True
    return int(running) > _RUNNING_PER_PROCESSOR * (os.cpu_count() or 1)
