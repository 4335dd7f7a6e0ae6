"""Scoring in worker processes that may hang, throw, exit or eat memory without harm to the run."""

import contextlib
import math
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing import connection, get_context
from statistics import fmean
from types import TracebackType
from typing import NamedTuple

from rwkv_es.errors import RewardError
from rwkv_es.mixture import load_tasks
from rwkv_es.scoring import NO_LOGS, Result, Scoring, load, score_one, serve
from rwkv_es.signatures import Answer
from rwkv_es.task import Problem

BATCH_SIZE = 64
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

    With `workers` 0 scoring happens in this process: no time limit, no memory limit, output is not silenced.
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
        """Score each text against its problem. Rewards depend on neither the number of workers nor their speed.

        `token_ids` of the completions and the `step` are for rewards that ask for them.

        Raises:
            RewardError: of 16 texts or more, a larger share than `error_limit` failed; or no worker can start.
        """
        ids = token_ids if token_ids is not None and self._sends_ids else [None] * len(texts)
        items = [Answer(*item, step) for item in zip(problems, texts, ids, strict=True)]
        tally = _Tally(len(items), self._error_limit)
        if self._scorer is not None:
            for index, item in enumerate(items):
                tally.put_(index, score_one(self._scorer, item))
            return tally.scores()
        try:
            self._dispatch(items, tally)
        except BaseException:
            for slot in range(len(self._workers)):  # what they are at belongs to nobody now
                self._replace_(slot)
            raise
        return tally.scores()

    def _dispatch(self, items: Sequence[Answer], tally: "_Tally") -> None:
        """Hand out batches until all is scored; a worker that fails costs one item, the rest of its batch goes back."""
        waiting = deque(range(len(items)))
        while True:
            for slot, worker in enumerate(self._workers):
                for result in worker.receive_():
                    tally.put_(worker.pending.popleft(), result)
                if worker.is_lost:
                    waiting.extend(worker.pending)
                    self._replace_(slot)
                elif worker.is_ready and waiting and not worker.pending:
                    size = min(BATCH_SIZE, max(1, len(waiting) // (2 * len(self._workers))))
                    worker.send_([waiting.popleft() for _ in range(size)], items)
            if not waiting and not any(worker.pending for worker in self._workers):
                return
            self._wait()

    def _replace_(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = _Worker(*self._settings)

    def _wait(self) -> None:
        """Sleep until a worker has something to say or runs out of time."""
        waited_for = [worker for worker in self._workers if worker.pending or not worker.is_ready]
        timeout_s = min(worker.deadline for worker in waited_for) - time.monotonic()
        connection.wait([worker.connection for worker in waited_for], max(0.0, timeout_s))


class _Tally:
    """Results by index, and whether too many of them are failures."""

    def __init__(self, size: int, error_limit: float) -> None:
        self.results: list[Result | None] = [None] * size
        self.error_limit = error_limit
        self.num_failed = 0

    def put_(self, index: int, result: Result) -> None:
        """Store a result; give up as soon as the failures are too many for the whole list."""
        self.results[index] = result
        self.num_failed += bool(result.error)
        size = len(self.results)
        if result.error and size >= MIN_ITEMS_FOR_LIMIT and self.num_failed > self.error_limit * size:
            scores = self.scores()
            raise RewardError(
                f"the reward failed on {self.num_failed} of {size} answers, {scores.timeouts} of them out of time; "
                f"the limit is {self.error_limit:.0%}. Mend the reward, or raise reward_error_limit or reward_timeout. "
                f"The first failure:\n{scores.first_error}"
            )

    def scores(self) -> Scores:
        known = [result for result in self.results if result is not None]
        failed = [result for result in known if result.error]
        timeouts = sum(result.is_timeout for result in failed)
        first_error = failed[0].error if failed else ""
        rewards = [result.reward for result in known]
        return Scores(rewards, len(failed) - timeouts, timeouts, first_error, _averages(known))


def _averages(results: Sequence[Result]) -> dict[str, float]:
    names = sorted({name for result in results for name in result.logs})
    return {name: fmean(result.logs[name] for result in results if name in result.logs) for name in names}


class _Worker:
    """One process, seen from the parent; `pending` are the indices it was sent and has not scored."""

    def __init__(self, scoring: Scoring, timeout_s: float) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, scoring, timeout_s + ORPHAN_S)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.timeout_s = timeout_s
        self.deadline = time.monotonic() + STARTUP_S
        self.pending: deque[int] = deque()
        self.is_ready = self.is_lost = False

    def send_(self, indices: list[int], items: Sequence[Answer]) -> None:
        self.pending.extend(indices)
        self.deadline = time.monotonic() + self.timeout_s
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # receive_ will notice
                self.connection.send([items[index] for index in indices])
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise RewardError(f"a problem cannot be sent to the reward workers, mind its meta: {error}") from None

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
