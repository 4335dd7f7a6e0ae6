"""What ties a process to the launcher that started it: none outlives it, and only what is lost starts again.

torchrun (and `accelerate launch`, which is built on it) starts whatever fails again, also a mistake that would fail for
ever. So a process that meets a mistake ends its launcher; one process says what is wrong, the others wait to be ended.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import ClusterError, Terminated

LOST = 75  # exit code where a process was lost and the same command continues (EX_TEMPFAIL of sysexits.h)
WATCH_S = 0.2  # how often a process looks whether its launcher lives
SILENT_S = 30.0  # how long a silent process waits for the one that speaks to end the launcher
AGAIN = "RWKV_ES_AGAIN"  # names the file in which `scripts/launch/again` reads what it cannot see
_LAUNCHED = "TORCHELASTIC_RUN_ID"  # the environment variable by which a launcher that restarts us is known
_PLACE = (_LAUNCHED, "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT", "RANK", "LOCAL_RANK")  # what it sets for a process
_LAUNCHERS = re.compile(
    r"(.*/)?(torchrun|accelerate(-launch)?|torch/distributed/(run|launch)|accelerate/commands/(launch|accelerate_cli))"
)


@contextmanager
def under_launcher() -> Iterator[None]:
    """Make SIGTERM an exception; end when the launcher dies; end the launcher where starting again mends nothing.

    Raises:
        Terminated: this process was asked to end.
    """
    launcher = launcher_pid()
    if launcher:
        threading.Thread(target=_end_with, args=(launcher,), daemon=True).start()
    before = on_sigterm(_terminate)
    try:
        yield
    except BaseException as error:
        if is_mistake(error):
            tell_again("mistake")
            if launcher and launcher == os.getppid():
                before = signal.SIG_IGN  # it passes the signal on, but this process ends by itself
                on_sigterm(before)
                os.kill(launcher, signal.SIGTERM)
        raise
    finally:
        on_sigterm(before)


def is_mistake(error: BaseException) -> bool:
    """Say whether the same command would fail again: whatever is not the loss of a process, or the wish to end it."""
    if isinstance(error, SystemExit):
        return error.code not in (None, 0)
    return not isinstance(error, (ClusterError, KeyboardInterrupt, GeneratorExit))


@contextmanager
def said_once() -> Iterator[None]:
    """Let one process of a machine say what all of them find wrong before they have met."""
    try:
        yield
    except Exception:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            wait_to_be_ended()
        raise


def wait_to_be_ended(asked: Sequence[int] = ()) -> None:
    """Give the process that says what is wrong the time to end the launcher, which ends this one; else go on.

    asked: not empty once this process has been asked to end.
    """
    on_sigterm(signal.SIG_DFL)
    if launcher_pid() and not asked:
        time.sleep(SILENT_S)


def tell_again(word: str) -> None:
    """Tell `scripts/launch/again`, if it gave the command, of a "step" or a "mistake"."""
    if file := os.environ.get(AGAIN):
        with contextlib.suppress(OSError):  # of another machine
            handle = os.open(file, os.O_WRONLY | os.O_APPEND)
            os.write(handle, f"{word}\n".encode())
            os.close(handle)


def launcher_pid() -> int | None:
    """Return the parent if it is a launcher that starts this process again when it fails; else None.

    Launchers mark a process by environment variables, which its children inherit: the parent itself must be a launcher
    and not have got the same values from another one.
    """
    if _LAUNCHED not in os.environ:
        return None
    parent = os.getppid()
    if not _LAUNCHERS.fullmatch(_program(_arguments(parent)).removesuffix(".py")):
        return None
    inherited = dict(pair.partition("=")[::2] for pair in _read_list(parent, "environ"))
    is_foreign = all(inherited.get(name) == os.environ.get(name) for name in _PLACE)
    return None if is_foreign else parent


def has_store() -> bool:
    """Say whether the store in which processes meet is in the launcher, which outlives them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and launcher_pid() is not None


def _arguments(pid: int) -> list[str]:
    """Return a process's command line, [] if it cannot be read."""
    if Path("/proc/self").exists():
        return _read_list(pid, "cmdline")
    command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()


def _read_list(pid: int, name: str) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/{name}").read_bytes()).split("\0")
    except OSError:
        return []


def _program(arguments: list[str]) -> str:
    """Return the script or (as a path) the module that a Python process runs."""
    words = iter(arguments[1:])
    for word in words:
        if re.fullmatch("-[a-zA-Z]*m", word):
            return next(words, "").replace(".", "/")
        if word in ("-X", "-W"):
            next(words, "")
        elif not word.startswith("-"):
            return word
    return ""


def on_sigterm(handler: Any) -> Any:
    """Set what SIGTERM does (in the main thread; elsewhere it cannot be set). Returns what it did."""
    is_main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if is_main else None


def _terminate(*_: object) -> None:
    raise Terminated


def _end_with(launcher: int) -> None:
    """End this process when its launcher has died without ending it: nobody would restart or stop it."""
    while os.getppid() == launcher:
        time.sleep(WATCH_S)
    print(
        "rwkv-es: the launcher is gone, so this process ends; the same command continues", file=sys.stderr, flush=True
    )
    os._exit(1)
