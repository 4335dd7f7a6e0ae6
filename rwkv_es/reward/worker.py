"""Answers scored, and the process that does nothing else: the far side of the pipe from `process.Worker`."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import NamedTuple

from rwkv_es.reward.adapters import Answer, Scorer, load_scorer
from rwkv_es.reward.values import event_loop, number
from rwkv_es.system.errors import RwkvEsError, cause, own_traceback
from rwkv_es.system.isolation import Bounds, guard, isolate, limit_memory
from rwkv_es.system.streams import make_unfailing
from rwkv_es.task.mixture import load_tasks

MAX_ERROR_CHARS = 4000
NO_LOGS: Mapping[str, float] = MappingProxyType({})
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory")


class Scoring(NamedTuple):
    """What scores answers, by its names in the options: any process can load it."""

    task: str
    data: str = ""
    reward: str = ""  # "": the task's own
    signature: str = "auto"
    sets: str = ""  # what a model is judged on


class Result(NamedTuple):
    """One scored text."""

    reward: float | None
    error: str = ""  # all that is known of a failure
    cause: str = ""  # the same in one line
    is_timeout: bool = False
    logs: Mapping[str, float] = NO_LOGS


def load(scoring: Scoring) -> Scorer:
    """Load the task and the rewards.

    Raises:
        TaskError, RewardError: one of them cannot be loaded.
    """
    event_loop()  # before a user's file is imported, which may make a client for it
    task = load_tasks(scoring.task, scoring.data, scoring.sets)
    return load_scorer(task, scoring.reward, scoring.signature)


def score_alone(scorer: Scorer, answer: Answer) -> Result:
    """Score one answer, as `score_together`."""
    results = score_together(scorer, [answer])
    assert results is not None, "one answer always has a result"
    return results[0]


def score_together(scorer: Scorer, answers: Sequence[Answer]) -> list[Result] | None:
    """Score; what is raised, and a value that is no finite number or None, becomes a failure.

    None: several answers could not be scored together, and each is to be scored alone.
    """
    try:
        return [Result(number(value), logs=logs) for value, logs in scorer.score(answers)]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  SystemExit too, and math-verify's timeout is no Exception
        return [_failure(error)] if len(answers) == 1 else None


def _score_in_worker(scorer: Scorer, answers: Sequence[Answer]) -> list[Result] | None:
    try:
        return score_together(scorer, answers)
    except KeyboardInterrupt as error:  # the reward's own: no key that is pressed reaches a worker
        return [_failure(error)] if len(answers) == 1 else None


def _failure(error: BaseException) -> Result:
    said, hint = cause(error), ""
    if isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY):
        hint = "; a reward may allocate as much as --reward-memory says, beyond what importing its file takes: load "
        hint += "models at import, outside of the function"
    try:
        return Result(0.0, own_traceback(error) + hint, said + hint)
    except Exception:  # noqa: BLE001  out of memory again, or the error cannot be written
        return Result(0.0, said + hint, said + hint)


def serve(
    parent: Connection,
    lifeline: Connection,
    output: Connection | None,
    scoring: Scoring,
    limits: tuple[float, float, Bounds],
) -> None:
    """Score batches of groups until the parent hangs up; what is printed goes to `output`, or nowhere.

    The first message is why the task cannot be loaded, or "", and whether the scorer compares. `limits` are the
    seconds for one answer, how far over them this process goes before it ends itself, and all else that it may take.
    """
    answer_s, grace_s, bounds = limits
    make_unfailing()  # for what rewards print
    isolate(bounds, output)
    guard(parent, lifeline)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # not "spawn", as for this
    try:
        scorer = load(scoring)
    except RwkvEsError as error:
        parent.send((str(error), False))
        return
    except BaseException:  # noqa: BLE001  any reason at all is reported to the parent, which raises
        parent.send((traceback.format_exc()[-MAX_ERROR_CHARS:], False))
        return
    limit_memory(bounds.memory_bytes)
    parent.send(("", scorer.compares))
    process = os.getpid()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            for answers in parent.recv():
                _set_alarm(answer_s * len(answers) + grace_s)
                results = _score_in_worker(scorer, answers)
                if os.getpid() != process:
                    os._exit(0)  # a child that the reward has forked came back as well: one of the two may speak
                _set_alarm(0.0)  # the parent may be busy, and listen later
                parent.send(None if results is None else [(*result[:-1], dict(result.logs)) for result in results])


def _set_alarm(seconds: float) -> None:
    """Let the system end this process then, even inside C code: a hung worker whose parent is gone kills itself."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
