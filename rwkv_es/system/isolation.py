"""What keeps a process that runs a user's code from harming others, or from being left behind."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

MEMORY_BYTES = 4 << 30  # what a worker may allocate after it has loaded the task
_SET_DEATH_SIGNAL, _ADOPT_ORPHANS = 1, 36  # of Linux's prctl


def end_processes(leader: int) -> None:
    """Kill a process with its group and, on Linux, its descendants that have made groups of their own."""
    for group in (*_groups_below(leader), leader):  # the last one may be the caller's own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def _groups_below(leader: int) -> Iterable[int]:
    """Return the process groups of all descendants that the system lists."""
    children: dict[int, list[tuple[int, int]]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # it has just ended
            parent, process_group = file.read_text("utf-8", "replace").rpartition(")")[2].split()[1:3]
            children.setdefault(int(parent), []).append((int(file.parent.name), int(process_group)))
    groups, waiting = set[int](), [leader]
    while waiting:
        for child, group in children.pop(waiting.pop(), []):
            waiting.append(child)
            groups.add(group)
    return groups - {leader, os.getpgrp()}


def isolate(output: Connection | None = None) -> None:
    """Lead a process group of its own (no Ctrl-C meant for the parent reaches it), and print to the output."""
    if hasattr(os, "setsid"):
        os.setsid()
    handle = os.open(os.devnull, os.O_WRONLY) if output is None else output.fileno()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if output is not None:
        output.close()
        for stream in (sys.stdout, sys.stderr):  # a line at a time, since this process may be ended at any time
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)


def guard(parent: Connection, lifeline: Connection) -> None:
    """Leave a process behind that ends this one and all it has started, hung or not, once the parent is gone.

    It is nobody's child, so that a reward which waits for its own children does not wait for it.
    """
    if not hasattr(os, "fork"):
        return
    leader = os.getpid()
    if (child := os.fork()) == 0:
        if os.fork() == 0:
            parent.close()
            with contextlib.suppress(EOFError, OSError):
                lifeline.recv()
            end_processes(leader)
        os._exit(0)
    os.waitpid(child, 0)
    lifeline.close()


def limit_memory() -> None:
    """Make an allocation beyond the limit a MemoryError rather than the machine's death (Linux)."""
    if sys.platform == "linux":
        import resource

        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = num_pages * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def die_with_parent() -> None:
    """Let the system end this process when its parent ends, however that happens (Linux)."""
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they are found by `end_processes` (Linux)."""
    _prctl(_ADOPT_ORPHANS, 1)


def _prctl(what: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(what, value, 0, 0, 0)
