"""What keeps a process that runs a user's code from harming others, or from being left behind."""

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

_SET_DEATH_SIGNAL, _ADOPT_ORPHANS = 1, 36  # of Linux's prctl


class Bounds(NamedTuple):
    """What a process that runs a user's code may take."""

    import_s: float = 60.0  # until it is ready
    memory_bytes: int = 4 << 30  # that it may allocate after that; 0: any number
    sees_gpus: bool = False


def end_processes(leader: int) -> None:
    """Kill a process with its group and, on Linux, its descendants that have made groups of their own."""
    for group in (*_groups_below(leader), leader):  # the last one may be the caller's own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


def _groups_below(leader: int) -> Iterable[int]:
    """Return the process groups of all descendants that the system lists."""
    return {group for _, group in _below(leader)} - {leader, os.getpgrp()}


def _below(leader: int) -> Iterator[tuple[int, int]]:
    """Yield all descendants that the system lists, and their process groups."""
    children_of = _listed_children if _are_listed() else _scanned()
    waiting = [leader]
    while waiting:
        for child in children_of(waiting.pop()):
            waiting.append(child)
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                yield child, os.getpgid(child)


def _are_listed() -> bool:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists()


def _listed_children(process: int) -> Iterator[int]:
    """Yield a process's children as Linux keeps them with it: no look at thousands of others."""
    for file in Path("/proc", str(process), "task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, file.read_text("ascii").split())


def _scanned() -> Callable[[int], list[int]]:
    """Look at all processes once. Returns what gives a process's children."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parent = file.read_text("utf-8", "replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(file.parent.name))
    return lambda process: children.pop(process, [])


def isolate(bounds: Bounds, output: Connection | None = None) -> None:
    """Lead a process group of its own (no Ctrl-C meant for the parent reaches it), and print to the output.

    CUDA finds no GPU there, unless the bounds say so: what a user's library takes of one, the run would lack.
    """
    if not bounds.sees_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
    """Go on as a child of this process, which stays behind as its guard and ends in the same way, after all else.

    It ends everything, hung or not, once the lifeline breaks. On Linux it becomes the parent of what has left its own
    parents and session, so that nothing that was started is ever out of its reach.
    """
    if not hasattr(os, "fork"):
        return
    adopt_orphans()
    if (child := os.fork()) == 0:
        die_with_parent()
        lifeline.close()
        return
    parent.close()
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    ended, status = 0, 0
    while ended != child:
        ended, status = os.wait()
    _end_children()
    if os.WIFSIGNALED(status):
        _end_by(os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    end_processes(os.getpid())


def _end_children() -> None:
    """Kill what is left below this process, whose children are all that have no other parent."""
    with contextlib.suppress(ChildProcessError):  # there are none
        os.waitpid(-1, os.WNOHANG)
        while True:
            for pid, _ in _below(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            os.wait()


def _end_by(number: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def limit_memory(num_bytes: int) -> None:
    """Make an allocation of more than that from now on (0: any) a MemoryError, not the machine's death (Linux)."""
    if sys.platform == "linux" and num_bytes:
        import resource

        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = num_pages * resource.getpagesize() + num_bytes
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
