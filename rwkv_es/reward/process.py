"""One worker process, seen from the parent."""

import atexit
import contextlib
import os
import pickle
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import connection, get_context

from rwkv_es.reward.adapters import Answer
from rwkv_es.reward.prints import Prints
from rwkv_es.reward.worker import Result, Scoring, serve
from rwkv_es.system.errors import RewardError
from rwkv_es.system.isolation import Bounds, end_processes

ORPHAN_S = 1.0  # how far over its time limit a worker goes before it ends itself, if nobody kills it
ALARM = getattr(signal, "SIGALRM", 0)
Unit = list[int]  # places of answers that are scored together, in order

_alive: "weakref.WeakSet[Worker]" = weakref.WeakSet()


class Worker:
    """A process that scores; `pending` are the units of what it was sent and has not scored."""

    def __init__(self, scoring: Scoring, timeout_s: float, bounds: Bounds, prints: Prints | None = None) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        their_lifeline, self.lifeline = context.Pipe(duplex=False)  # broken when this process is gone
        ours, output = context.Pipe(duplex=False) if prints is not None else (None, None)
        arguments = (theirs, their_lifeline, output, scoring, (timeout_s, ORPHAN_S, bounds))
        self.process = context.Process(target=serve, args=arguments)  # no daemon: those may not start processes
        self.process.start()
        _alive.add(self)
        theirs.close()
        their_lifeline.close()
        if prints is not None and ours is not None and output is not None:
            output.close()
            prints.follow(os.dup(ours.fileno()))
            ours.close()
        self.timeout_s, self.bounds = timeout_s, bounds
        self.deadline = time.monotonic() + bounds.import_s
        self.sender: threading.Thread | None = None
        self.pending: deque[Unit] = deque()
        self.is_ready = self.is_lost = self.is_late = self.compares = False

    def send(self, units: Sequence[Unit], answers: Mapping[int, Answer]) -> None:
        """Send answers in a thread: a worker that does not read, hung by what an answer left behind, stops nobody."""
        self.pending.extend(units)
        self._reset_deadline()
        try:
            message = pickle.dumps([[answers[place] for place in unit] for unit in units])
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise RewardError(f"a problem cannot be sent to the reward workers, mind its meta: {error}") from None
        self.sender = threading.Thread(target=_send, args=(self.connection, message), daemon=True)
        self.sender.start()

    def receive(self) -> list[tuple[Unit, list[Result] | None]]:
        """Return the units whose results have arrived; None for one that cannot be scored together.

        Afterwards `is_lost` says whether the process is gone, with the first of `pending` in work.

        Raises:
            RewardError: the task cannot be loaded there, or the process hung or ended by itself while starting.
        """
        found = self._read()
        self.is_late = not (found or self.is_lost) and self._is_over_time()
        if self.is_lost or self.is_late:
            self.kill()
            self.is_lost = True
            if not self.is_ready and not self.was_killed:
                raise RewardError(self._why_not_ready())
        return found

    @property
    def is_out_of_time(self) -> bool:
        """Whether a lost process was ended because an answer took too long."""
        return self.is_late or self.process.exitcode == -ALARM

    @property
    def was_killed(self) -> bool:
        """Whether a lost process was ended by a signal from outside, or one that a crash makes."""
        return not self.is_late and (self.process.exitcode or 0) < 0

    def failure(self) -> Result:
        """Say what became of the answer that a lost process was at."""
        if self.is_out_of_time:
            error = f"the reward ran over its time limit of {self.timeout_s:g} s"
            return Result(0.0, error, error, is_timeout=True)
        code = self.process.exitcode
        error = f"the reward ended its process (exit code {code}; a negative one is a signal)"
        return Result(0.0, error, error)

    def _why_not_ready(self) -> str:
        if self.is_late:
            return (
                f"a reward worker was not ready after {self.bounds.import_s:g} s; does importing the task or the "
                "reward hang? If it only takes long, raise --reward-import-timeout"
            )
        return (
            f"a reward worker ended while starting (exit code {self.process.exitcode}); does importing the task work, "
            "and has your script, if you wrote one, `if __name__ == '__main__':`?"
        )

    def kill(self) -> None:
        """End the process, and whatever it has started, at once."""
        if self.process.pid and not self.is_lost:
            end_processes(self.process.pid)  # it leads a group of its own from its first line on
        self.process.kill()
        self.process.join()
        if self.sender is not None:
            self.sender.join(1.0)  # it fails at once, unless a process that the worker has started holds the pipe
        self.connection.close()
        self.lifeline.close()
        _alive.discard(self)

    def _read(self) -> list[tuple[Unit, list[Result] | None]]:
        found: list[tuple[Unit, list[Result] | None]] = []
        is_alive = self.process.is_alive()  # asked first: what it said before its end is still to be read
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if self.is_ready:
                    results = None if message is None else [Result(*result) for result in message]
                    found.append((self.pending.popleft(), results))
                elif message[0]:
                    raise RewardError(f"a reward worker cannot load the task:\n{message[0]}")
                else:
                    self.is_ready, self.compares = True, message[1]
                self._reset_deadline()
        except (EOFError, OSError):
            self.process.join(1.0)  # for its own exit code, before it is killed
            is_alive = False
        if not is_alive:
            assert self.process.pid, "it was started"
            end_processes(self.process.pid)
            self.is_lost = True
        return found

    def _reset_deadline(self) -> None:
        self.deadline = time.monotonic() + self.timeout_s * len(self.pending[0] if self.pending else (0,))

    def _is_over_time(self) -> bool:
        is_awaited = bool(self.pending) or not self.is_ready
        return is_awaited and time.monotonic() > self.deadline and not self.connection.poll()


def _send(to_worker: connection.Connection, message: bytes) -> None:
    with contextlib.suppress(OSError):  # the worker is gone; receive will notice
        to_worker.send_bytes(message)


@atexit.register
def _end_all() -> None:
    """End the workers of pools that nobody closed: Python would wait for them."""
    for worker in list(_alive):
        worker.kill()
