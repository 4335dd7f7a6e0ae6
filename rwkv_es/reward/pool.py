"""Scoring in worker processes that may hang, throw, exit or eat memory without harm to the run."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from textwrap import indent
from types import TracebackType

from rwkv_es.config.options import Config
from rwkv_es.reward.adapters import Answer, Scorer
from rwkv_es.reward.prints import Prints
from rwkv_es.reward.process import Worker
from rwkv_es.reward.sheet import TRIES, Group, Scores, Sheet
from rwkv_es.reward.worker import Scoring, load, score_together
from rwkv_es.system.errors import RewardError
from rwkv_es.system.isolation import Bounds
from rwkv_es.system.texts import printable
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.task import Problem

BATCH_SIZE = 64
LOOK_S = 0.01  # how often workers are tended while answers are generated
DEFAULT_BOUNDS = Bounds()
WAIT_S = 0.5  # a worker's end may show in nothing that is waited for, where what it has started lives on


def bounds_of(config: Config) -> Bounds:
    """Return what the options let processes of users' code take."""
    return Bounds(config.reward_import_timeout, int(config.reward_memory * (1 << 30)), config.reward_cuda)


def _is_own(task_spec: str, reward: str) -> bool:
    """Say whether somebody's own code scores and this process speaks: then it is of interest what is printed there."""
    return bool(reward or "/" in task_spec or ".py" in task_spec) and os.environ.get("RANK", "0") == "0"


class RewardPool:
    """Worker processes that score texts with a task's reward; a context manager.

    Answers may be taken one by one while others are still being generated: `submit`, `poll`, `gather`. With
    `workers` 0, or a `scorer`, all are scored at the end, in this process: no time or memory limit, no silence.
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
        sets: str = "",
        bounds: Bounds = DEFAULT_BOUNDS,
        scorer: Scorer | None = None,
    ) -> None:
        self._scorer: Scorer | None = None
        self._sheet, self.error_limit = Sheet(), error_limit
        self._killed_starts, self._next_look, self.has_spoken = 0, 0.0, False  # the first: in a row
        if scorer is not None:  # a Python object: it scores in this process
            self._scorer, self.is_users, self._num_workers, self._workers = scorer, True, 0, []
            return
        scoring = Scoring(task_spec, data, reward, signature, sets)
        task = load_tasks(task_spec, data, sets)
        if reward and task.environment is not None:
            raise RewardError(f"the environment of task {task.name} gives its rewards; leave --reward out")
        if not workers and task.timeout_s < math.inf:
            raise RewardError(f"the scorer of task {task.name} may hang, so it needs reward_workers of 1 or more")
        if all(part.environment is not None for part in task.parts or (task,)):
            workers = 0  # there is nothing to score
        self._scorer = None if workers else load(scoring)
        self.is_users = bool(reward)
        prints = Prints() if _is_own(task_spec, reward) else None
        self._settings = (scoring, min(timeout_s, task.timeout_s), bounds, prints)
        self._num_workers = workers
        self._workers = [Worker(*self._settings) for _ in range(workers)]

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, and drop what was taken; what is taken afterwards is scored by new ones."""
        self._sheet, workers, self._workers = Sheet(), self._workers, []
        for worker in workers:
            worker.kill()

    def score(
        self,
        problems: Sequence[Problem],
        texts: Sequence[str],
        token_ids: Sequence[Sequence[int]] | None = None,
        step: int = 0,
    ) -> Scores:
        """Take all texts, each by itself, and `gather`; `token_ids` and `step` are for rewards that ask for them."""
        ids = token_ids if token_ids is not None else [None] * len(texts)
        for place, item in enumerate(tuple(zip(problems, texts, ids, strict=True))):
            self.submit(place, Answer(*item, step))
        return self.gather()

    def submit(self, place: int, answer: Answer, group: Group | None = None) -> None:
        """Accept an answer; `gather` will return its reward in the order of the places. Nothing is waited for.

        Answers of one group are scored when all of it are there, in the order of their places.
        """
        if self.is_users:
            self._sheet.add(place, answer, group)
        else:
            self._sheet.add(place, answer._replace(token_ids=None), None)

    def poll(self) -> None:
        """Let the workers go on with what was taken, and wait for none of them. Cheap enough for every tick.

        Raises:
            RewardError: no worker can start, or an answer cannot be sent.
        """
        if self._num_workers and time.monotonic() >= self._next_look:
            with self._closing_on_error():
                self._look()
            self._next_look = time.monotonic() + LOOK_S

    def gather(self) -> Scores:
        """Wait until all that was taken is scored, and forget it. Rewards do not depend on the workers or their speed.

        Raises:
            RewardError: of 16 answers or more, a larger share than `error_limit` failed; or no worker can start.
        """
        sheet = self._sheet
        sheet.close_groups()
        with self._closing_on_error():
            while not self._is_complete(sheet):
                if self._scorer is not None:
                    for unit in sheet.next_units(1, self._scorer.compares):
                        sheet.put(unit, score_together(self._scorer, [sheet.answers[place] for place in unit]))
                else:
                    self._look()
                    self._wait()
        self._sheet = Sheet()
        return sheet.scores()

    def _is_complete(self, sheet: Sheet) -> bool:
        """Say whether all is scored; before the pool gives up, what failed first is shown."""
        try:
            return sheet.is_complete(self.error_limit)
        except RewardError:
            if self.is_users:
                self.say_failure(sheet.scores())
            raise

    def say_failure(self, scores: Scores | None) -> None:
        """Say on stderr what failed first: once, the metrics count the rest. None: another process says it."""
        if (scores is None or scores.causes) and not self.has_spoken:
            self.has_spoken = True
            if scores is not None:
                shown = indent(printable(scores.first_error), "  ")
                print(
                    f"rwkv-es: the reward failed on {len(scores.causes)} of {len(scores.rewards)} answers, which count "
                    f"as 0 (reported once; reward_errors counts on); the first time:\n{shown}",
                    file=sys.stderr,
                )

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """After an error, drop all answers and end the workers: what they are at belongs to nobody."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _look(self) -> None:
        """Take in results and hand out batches; a worker that is lost leaves the rest of its batch to others."""
        sheet = self._sheet
        self._workers += [Worker(*self._settings) for _ in range(self._num_workers - len(self._workers))]
        for slot, worker in enumerate(self._workers):
            for unit, results in worker.receive():
                sheet.put(unit, results)
            if worker.is_ready:
                self._killed_starts = 0
            if worker.is_lost:
                self._give_back(worker)
                self._workers[slot] = Worker(*self._settings)
            elif worker.is_ready and sheet.waiting and not worker.pending:
                size = min(BATCH_SIZE, max(1, len(sheet.waiting) // (2 * len(self._workers))))
                worker.send(sheet.next_units(size, worker.compares), sheet.answers)

    def _give_back(self, worker: Worker) -> None:
        """Have scored by others what a lost worker was at, and what it had not begun with.

        Raises:
            RewardError: workers are killed again and again before they are ready.
        """
        if not worker.is_ready:
            self._killed_starts += 1
            if self._killed_starts >= TRIES:
                raise RewardError(
                    f"reward workers were killed while starting, {TRIES} times in a row (exit code "
                    f"{worker.process.exitcode}); is there enough memory for reward_workers {self._num_workers}?"
                )
        unit, *others = worker.pending or [[]]
        self._sheet.waiting.extend(others)
        if unit:
            self._sheet.lose(unit, worker.failure())

    def _wait(self) -> None:
        """Sleep until a worker has something to say or runs out of time; not at all if one has nothing to do."""
        waited_for = [worker for worker in self._workers if worker.pending or not worker.is_ready]
        if len(waited_for) < len(self._workers) and self._sheet.waiting:
            return
        timeout_s = min((worker.deadline for worker in waited_for), default=0.0) - time.monotonic()
        connection.wait([worker.connection for worker in waited_for], max(0.0, min(timeout_s, WAIT_S)))
