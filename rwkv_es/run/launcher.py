"""What ties a process to the launcher that started it: none outlives it, and it does not restart a user's mistake."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rwkv_es.errors import ClusterError, RwkvEsError, Terminated

WATCH_S = 0.2  # how often a process looks whether its launcher lives
_LAUNCHED = "TORCHELASTIC_RUN_ID"  # the environment variable by which a launcher that restarts us is known


@contextmanager
def under_launcher() -> Iterator[None]:
    """Make SIGTERM an exception; end when the launcher dies; end the launcher when the user has something to mend.

    Raises:
        Terminated: this process was asked to end.
    """
    is_launched, is_mistake = _LAUNCHED in os.environ, False
    if is_launched:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    before = on_sigterm(_terminate)
    try:
        yield
    except RwkvEsError as error:
        is_mistake = not isinstance(error, ClusterError)  # what a restart would not mend
        raise
    finally:
        on_sigterm(before)
        if is_launched and is_mistake:
            on_sigterm(signal.SIG_IGN)  # it passes the signal on, but first the mistake has to be said
            os.kill(os.getppid(), signal.SIGTERM)


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
