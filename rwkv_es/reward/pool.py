"""Scoring in worker processes that may hang, throw, exit or eat memory without harm to the run."""

import contextlib
import math
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection, get_context
from statistics import fmean
from types import TracebackType
from typing import NamedTuple

from rwkv_es.errors import RewardError
from rwkv_es.reward.adapters import Answer
from rwkv_es.reward.worker import NO_LOGS, Result, Scoring, load, score_one, serve
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.task import Problem

BATCH_SIZE = 64
LOOK_S = 0.01  # how often workers are tended while answers are generated
STARTUP_S = 60.0
ORPHAN_S = 1.0  # how far over its time limit a worker goes before it ends itself, if nobody kills it
MIN_ITEMS_FOR_LIMIT = 16
ALARM = getattr(signal, "SIGALRM", 0)


class Scores(NamedTuple):
    """Rewards in the order of the texts. None: the scorer said "not applicable". Failures score 0.0."""

    rewards: list[float | None]
    errors: int
    timeouts: int
    first_error: str  # traceback of the first failure in the order of the texts; "" without failures
    metrics: Mapping[str, float] = NO_LOGS  # what the rewards log, averaged over the texts that have it


class RewardPool:
    """Worker processes that score texts with a task's reward; a context manager.

    Answers may be taken one by one while others are still being generated: `take_`, `tend_`, `collect_`. With
    `workers` 0 all are scored at the end, in this process: no time limit, no memory limit, output is not silenced.
    A script of your own that makes a pool with workers needs `if __name__ == "__main__":`, since workers import it.

    Raises:
        TaskError: the task cannot be loaded.
    """

    def __init__(
        self,
        task_spec: str,
        data: str,
        workers: int,
        timeout_s: float,
        error_limit: float,
        *,
        reward: str = "",
        signature: str = "auto",
    ) -> None:
        scoring = Scoring(task_spec, data, reward, signature)
        task = load_tasks(task_spec, data)
        if not workers and task.timeout_s < math.inf:
            raise RewardError(f"the scorer of task {task.name} may hang, so it needs reward_workers of 1 or more")
        self._scorer = None if workers else load(scoring)
        self._sends_ids = bool(reward)
        self._settings = (scoring, min(timeout_s, task.timeout_s))
        self._error_limit = error_limit
        self._workers = [_Worker(*self._settings) for _ in range(workers)]
        self._sheet = _Sheet()
        self._next_look = 0.0

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers; the pool cannot be used afterwards."""
        for worker in self._workers:
            worker.kill()

    def score(
        self,
        problems: Sequence[Problem],
        texts: Sequence[str],
        token_ids: Sequence[Sequence[int]] | None = None,
        step: int = 0,
    ) -> Scores:
        """Take all texts and `collect_`; `token_ids` and `step` are for rewards that ask for them."""
        ids = token_ids if token_ids is not None else [None] * len(texts)
        for place, item in enumerate(tuple(zip(problems, texts, ids, strict=True))):
            self.take_(place, Answer(*item, step))
        return self.collect_()

    def take_(self, place: int, answer: Answer) -> None:
        """Accept an answer; `collect_` will return its reward in the order of the places. Nothing is waited for."""
        self._sheet.answers[place] = answer if self._sends_ids else answer._replace(token_ids=None)
        self._sheet.waiting.append(place)

    def tend_(self) -> None:
        """Let the workers go on with what was taken, and wait for none of them. Cheap enough for every tick.

        Raises:
            RewardError: no worker can start, or an answer cannot be sent.
        """
        if self._workers and time.monotonic() >= self._next_look:
            with self._forgetting_on_error_():
                self._look_()
            self._next_look = time.monotonic() + LOOK_S

    def collect_(self) -> Scores:
        """Wait until all that was taken is scored, and forget it. Rewards do not depend on the workers or their speed.

        Raises:
            RewardError: of 16 answers or more, a larger share than `error_limit` failed; or no worker can start.
        """
        sheet = self._sheet
        sheet.waiting = deque(sorted(sheet.waiting))
        with self._forgetting_on_error_():
            while not sheet.is_complete(self._error_limit):
                if self._scorer is not None:
                    place = sheet.waiting.popleft()
                    sheet.put_(place, score_one(self._scorer, sheet.answers[place]))
                else:
                    self._wait()
                    self._look_()
        self._sheet = _Sheet()
        return sheet.scores()

    @contextlib.contextmanager
    def _forgetting_on_error_(self) -> Iterator[None]:
        """After an error, drop all answers and begin with new workers: what the old ones are at belongs to nobody."""
        try:
            yield
        except BaseException:
            self._sheet = _Sheet()
            for slot in range(len(self._workers)):
                self._replace_(slot)
            raise

    def _look_(self) -> None:
        """Take in results and hand out batches; a worker that fails costs one answer, the rest of its batch waits."""
        sheet = self._sheet
        for slot, worker in enumerate(self._workers):
            for result in worker.receive_():
                sheet.put_(worker.pending.popleft(), result)
            if worker.is_lost:
                sheet.waiting.extend(worker.pending)
                self._replace_(slot)
            elif worker.is_ready and sheet.waiting and not worker.pending:
                size = min(BATCH_SIZE, max(1, len(sheet.waiting) // (2 * len(self._workers))))
                worker.send_([sheet.waiting.popleft() for _ in range(size)], sheet.answers)

    def _replace_(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = _Worker(*self._settings)

    def _wait(self) -> None:
        """Sleep until a worker has something to say or runs out of time; not at all where one has nothing to do."""
        waited_for = [worker for worker in self._workers if worker.pending or not worker.is_ready]
        if len(waited_for) < len(self._workers) and self._sheet.waiting:
            return
        timeout_s = min(worker.deadline for worker in waited_for) - time.monotonic()
        connection.wait([worker.connection for worker in waited_for], max(0.0, timeout_s))


class _Sheet:
    """Answers that are scored together, by their places, and what is known of them."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.waiting: deque[int] = deque()  # no worker has them
        self.results: dict[int, Result] = {}
        self.num_failed = 0

    def put_(self, place: int, result: Result) -> None:
        self.results[place] = result
        self.num_failed += bool(result.error)

    def is_complete(self, error_limit: float) -> bool:
        """Say whether all is scored. Raises RewardError as soon as the failures are too many for all answers."""
        size = len(self.answers)
        if size >= MIN_ITEMS_FOR_LIMIT and self.num_failed > error_limit * size:
            scores = self.scores()
            raise RewardError(
                f"the reward failed on {self.num_failed} of {size} answers, {scores.timeouts} of them out of time; "
                f"the limit is {error_limit:.0%}. Mend the reward, or raise reward_error_limit or reward_timeout. "
                f"The first failure:\n{scores.first_error}"
            )
        return len(self.results) == size

    def scores(self) -> Scores:
        """Return what is known so far, in the order of the places."""
        known = [self.results[place] for place in sorted(self.results)]
        failed = [result for result in known if result.error]
        timeouts = sum(result.is_timeout for result in failed)
        first_error = failed[0].error if failed else ""
        return Scores([r.reward for r in known], len(failed) - timeouts, timeouts, first_error, _averages(known))


def _averages(results: Sequence[Result]) -> dict[str, float]:
    names = sorted({name for result in results for name in result.logs})
    return {name: fmean(result.logs[name] for result in results if name in result.logs) for name in names}


class _Worker:
    """One process, seen from the parent; `pending` are the places of what it was sent and has not scored."""

    def __init__(self, scoring: Scoring, timeout_s: float) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, scoring, timeout_s + ORPHAN_S)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + STARTUP_S
        self.sender: threading.Thread | None = None
        self.pending: deque[int] = deque()
        self.is_ready = self.is_lost = False

    def send_(self, places: list[int], answers: Mapping[int, Answer]) -> None:
        """Send answers in a thread: a worker that does not read, hung by what an answer left behind, stops nobody."""
        self.pending.extend(places)
        self.deadline = time.monotonic() + self.timeout_s
        try:
            message = pickle.dumps([answers[place] for place in places])
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise RewardError(f"a problem cannot be sent to the reward workers, mind its meta: {error}") from None
        self.sender = threading.Thread(target=_send, args=(self.connection, message), daemon=True)
        self.sender.start()

    def receive_(self) -> list[Result]:
        """Return the results that have arrived, and a failure for the item in work if the process is lost with it.

        Raises:
            RewardError: the process did not get as far as loading the task.
        """
        results = self._read_()
        is_late = not (results or self.is_lost) and self._is_late()
        if self.is_lost or is_late:
            self.kill()
            self.is_lost = True
            if not self.is_ready:
                raise RewardError(
                    f"a reward worker ended or hung while starting (exit code {self.process.exitcode}); does importing "
                    "the task work, and has your script, if you wrote one, `if __name__ == '__main__':`?"
                )
            if len(results) < len(self.pending):
                results.append(self._failure(is_late))
        return results

    def kill(self) -> None:
        """End the process, and whatever it has started, at once."""
        if hasattr(os, "killpg") and self.process.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads a group of its own from its first line on
        self.process.kill()
        self.process.join()
        if self.sender is not None:
            self.sender.join(1.0)  # it fails at once, unless a process that the worker has started holds the pipe
        self.connection.close()

    def _read_(self) -> list[Result]:
        results = []
        try:
            while self.connection.poll():
                message = self.connection.recv()
                self.deadline = time.monotonic() + self.timeout_s
                if self.is_ready:
                    results.append(Result(*message))
                elif message:
                    raise RewardError(f"a reward worker cannot load the task:\n{message}")
                self.is_ready = True
        except (EOFError, OSError):
            self.process.join(1.0)  # for its own exit code, before it is killed
            self.is_lost = True
        return results

    def _is_late(self) -> bool:
        is_awaited = bool(self.pending) or not self.is_ready
        return is_awaited and time.monotonic() > self.deadline and not self.connection.poll()

    def _failure(self, is_late: bool) -> Result:
        code = self.process.exitcode
        if is_late or code == -ALARM:
            return Result(0.0, f"the reward ran over its time limit of {self.timeout_s:g} s", is_timeout=True)
        return Result(0.0, f"the reward ended its process (exit code {code}; a negative one is a signal)")


def _send(to_worker: connection.Connection, message: bytes) -> None:
    with contextlib.suppress(OSError):  # the worker is gone; receive_ will notice
        to_worker.send_bytes(message)
