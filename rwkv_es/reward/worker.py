"""One answer scored, and the process that does nothing else: the far side of the pipe from `reward.RewardPool`."""

import contextlib
import math
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rwkv_es.errors import RwkvEsError
from rwkv_es.reward.adapters import Answer, Scorer, load_scorer
from rwkv_es.task.mixture import load_tasks

MEMORY_BYTES = 4 << 30  # what a worker may allocate after it has loaded the task
MAX_ERROR_CHARS = 4000
NO_LOGS: Mapping[str, float] = MappingProxyType({})


class Scoring(NamedTuple):
    """What scores answers, by its names in the options: any process can load it."""

    task: str
    data: str = ""
    reward: str = ""  # "": the task's own
    signature: str = "auto"


class Result(NamedTuple):
    """One scored text."""

    reward: float | None
    error: str = ""
    is_timeout: bool = False
    logs: Mapping[str, float] = NO_LOGS


def load(scoring: Scoring) -> Scorer:
    """Load the task and the rewards.

    Raises:
        TaskError, RewardError: one of them cannot be loaded.
    """
    return load_scorer(load_tasks(scoring.task, scoring.data), scoring.reward, scoring.signature)


def score_one(scorer: Scorer, answer: Answer) -> Result:
    """Score; what is raised, and a value that is no finite number or None, becomes a failure."""
    try:
        value, logs = scorer(answer)
        return Result(None if value is None else _finite(value), logs=logs)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  SystemExit too, and math-verify's timeout is no Exception
        return Result(0.0, traceback.format_exc()[-MAX_ERROR_CHARS:])


def _finite(value: Any) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"the reward must be a number or None (not applicable); got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"the reward must be finite, or None (not applicable); got {value}")
    return float(value)


def serve(parent: Connection, scoring: Scoring, alarm_s: float) -> None:
    """Score batches until the parent hangs up; first thing said is "" or why the task cannot be loaded."""
    _isolate()
    try:
        scorer = load(scoring)
    except RwkvEsError as error:
        parent.send(str(error))
        return
    except BaseException:  # noqa: BLE001  any reason at all is reported to the parent, which raises
        parent.send(traceback.format_exc()[-MAX_ERROR_CHARS:])
        return
    _limit_memory()
    parent.send("")
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            for answer in parent.recv():
                _set_alarm(alarm_s)
                result = score_one(scorer, answer)
                _set_alarm(0.0)  # the parent may be busy, and listen later
                parent.send((*result[:-1], dict(result.logs)))


def _isolate() -> None:
    """Lead a process group of its own (no Ctrl-C meant for the parent reaches it), and print to nowhere."""
    if hasattr(os, "setsid"):
        os.setsid()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _limit_memory() -> None:
    """Make an allocation beyond the limit a MemoryError rather than the machine's death (Linux)."""
    if sys.platform == "linux":
        import resource

        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = num_pages * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _set_alarm(seconds: float) -> None:
    """Let the system end this process then, even inside C code: a hung worker whose parent is gone kills itself."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
