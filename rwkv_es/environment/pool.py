"""Environments seen from the token loop: answers are handed over, what is said to them comes when it comes."""

import atexit
import contextlib
import itertools
import pickle
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import connection, get_context
from queue import SimpleQueue
from typing import Any

from rwkv_es.config.options import Config
from rwkv_es.environment.children import Staging
from rwkv_es.environment.host import Ask, serve
from rwkv_es.environment.play import Answer, Cut, Game, Said
from rwkv_es.reward.pool import bounds_of
from rwkv_es.reward.sheet import TRIES
from rwkv_es.system.errors import RewardError
from rwkv_es.system.isolation import end_processes
from rwkv_es.task.task import Problem, Task
from rwkv_es.task.turns import Limits

MOST_CHARS = 8  # of a reply, for each token that an episode may have

_open: "weakref.WeakSet[Environments]" = weakref.WeakSet()


class Environments:
    """Many episodes at once, each known by a number; a slow environment delays its own episode only.

    Without workers, or with an `environment` that is a Python object, they run in this process when they are asked: no
    limit of time or memory.
    """

    def __init__(self, staging: Staging, environment: Callable[[Problem], Any] | None = None) -> None:
        self._staging, self._environment = staging, environment
        self._numbers = itertools.count()
        self._games: dict[int, Game] = {}
        self._said: list[tuple[int, Said]] = []
        self._begun: dict[int, tuple[Problem, list[Answer]]] = {}  # episodes that go on, with all answers
        self._asks: list[int] = []  # episodes of which the host is yet to hear
        self._awaited: dict[int, None] = {}  # those that owe a reply, in order
        self._known: set[int] = set()  # by the host
        self._num_lost = 0  # hosts that were killed, since one has spoken
        self._process: Any = None
        if environment is None:
            self._start()

    def begin(self, problem: Problem, text: str) -> int:
        """Begin an episode with the model's first answer. Returns its number."""
        number = next(self._numbers)
        if self._environment is None:
            self._begun[number] = (problem, [text])
            self._ask(number)
        else:
            self._games[number] = Game(self._environment, problem, self._staging.most_chars)
            self._play(number, text)
        return number

    def answer(self, number: int, text: Answer) -> None:
        """Hand over the model's next answer, or that a limit has ended the episode."""
        if self._environment is None:
            self._begun[number][1].append(text)
            self._ask(number)
        else:
            self._play(number, text)

    def forget(self, number: int) -> None:
        """End an episode that is not over."""
        if self._environment is None:
            self._over(number)
            self._asks.append(number)
        elif (game := self._games.pop(number, None)) is not None:
            game.close()

    def poll(self, wait_s: float = 0.0) -> list[tuple[int, Said]]:
        """Send what was handed over, and return what was said since the last time, by the episodes' numbers.

        Raises:
            RewardError: the task cannot be loaded in the host, or the host has ended. One that was killed is replaced,
                and its episodes begin anew there.
        """
        if self._process is not None:
            if self._asks:
                self._outbox.put(self._pickled())
            self._receive(wait_s)
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """End all environments and their processes."""
        for game in self._games.values():
            game.close()
        self._games, self._asks, self._said = {}, [], []
        self._end_host()
        _open.discard(self)

    def _ask(self, number: int) -> None:
        self._asks.append(number)
        self._awaited[number] = None

    def _over(self, number: int) -> None:
        self._begun.pop(number, None)
        self._awaited.pop(number, None)
        self._known.discard(number)

    def _end_host(self) -> None:
        if self._process is not None:
            self._outbox.put(None)
            end_processes(self._process.pid)
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._lifeline.close()
            self._process = None

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        their_lifeline, self._lifeline = context.Pipe(duplex=False)  # broken when this process is gone
        self._heard = select.poll()  # asked every tick: a tenth of what Connection.poll takes
        self._heard.register(self._connection, select.POLLIN)
        self._process = context.Process(target=serve, args=(theirs, their_lifeline, self._staging))
        self._process.start()
        theirs.close()
        their_lifeline.close()
        self._is_ready, self._ready_by = False, time.monotonic() + self._staging.bounds.import_s
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()  # a host that is slow to read stops nobody
        threading.Thread(target=_post, args=(self._connection, self._outbox), daemon=True).start()
        _open.add(self)

    def _play(self, number: int, text: Answer) -> None:
        game = self._games[number]
        said = game.cut() if isinstance(text, Cut) else game.answer(text)
        self._said.append((number, said))
        if said.is_over:
            self._games.pop(number).close()

    def _pickled(self) -> bytes:
        asks: list[Ask] = []
        for number in self._asks:
            problem, texts = self._begun.get(number, (None, None))
            if number in self._known:
                problem, texts = None, texts and texts[-1:]
            elif texts:
                self._known.add(number)
            asks.append((number, problem, texts))
        self._asks = []
        try:
            return pickle.dumps(asks)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise RewardError(f"a problem cannot be sent to the environments, mind its meta: {error}") from None

    def _receive(self, wait_s: float) -> None:
        """Take in what the host has said; wait for it up to some time."""
        try:
            while self._heard.poll(1000 * wait_s):
                wait_s, message = 0.0, self._connection.recv()
                if self._is_ready:
                    self._take(message)
                elif message:
                    raise RewardError(f"the environments cannot load the task: {message}")
                self._is_ready = True
        except (EOFError, OSError):
            self._replace_host()
        if not self._is_ready and time.monotonic() > self._ready_by:
            self.close()
            raise RewardError(
                f"the environments were not ready after {self._staging.bounds.import_s:g} s; does importing the task "
                "hang? If it only takes long, raise --reward-import-timeout"
            )

    def _take(self, message: Sequence[tuple[int, Said]]) -> None:
        """Take in replies to episodes that go on."""
        self._num_lost = 0
        for number, said in message:
            if number in self._begun:
                self._awaited.pop(number, None)
                self._said.append((number, said))
                if said.is_over:
                    self._over(number)

    def _replace_host(self) -> None:
        """Start another host in the place of one that was killed; the episodes begin anew there, and hear all answers.

        Raises:
            RewardError: it ended by itself, or hosts are killed again and again.
        """
        self._process.join(1.0)
        code = self._process.exitcode
        self._end_host()
        self._num_lost += 1
        if code is None or code >= 0 or self._num_lost >= TRIES:
            self.close()
            raise RewardError(
                f"the process that hosts the environments ended (exit code {code}; a negative one is a signal); does "
                "importing the task work, and is there enough memory?"
            )
        print(
            f"rwkv-es: the process that hosts the environments was killed (signal {-code}); another one plays its "
            "episodes anew",
            file=sys.stderr,
        )
        self._known.clear()
        self._asks = list(self._awaited)
        self._start()


def _post(host: connection.Connection, outbox: "SimpleQueue[bytes | None]") -> None:
    with contextlib.suppress(OSError):  # the host is gone, which is noticed where it is listened to
        while (message := outbox.get()) is not None:
            host.send_bytes(message)


def environments_of(config: Config, task: Task, limits: Sequence[Limits], *, is_here: bool) -> Environments:
    """Start the environments of a task, whose parts have some limits: in processes, or in this one."""
    staging = Staging(
        config.task,
        config.data,
        min(config.reward_timeout, task.timeout_s),
        max(each.seconds for each in limits),
        config.reward_workers,
        MOST_CHARS * max(each.tokens for each in limits),
        bounds_of(config),
        config.eval_sets,
    )
    return Environments(staging, task.environment if is_here else None)


@atexit.register
def _end_all() -> None:
    """End the hosts that nobody closed: Python would wait for them."""
    for environments in list(_open):
        environments.close()
