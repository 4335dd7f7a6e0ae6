"""One process at a time in a run folder, on one host or on several that share it.

flock holds between the processes of a host; on network file systems each host may lock for itself. So beside it a file
says who has the folder, and is written anew every few seconds: who finds it watches whether it changes.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError

FILE = ".rwkv-es-lock.json"
HEARTBEAT_S = 2.0
PATIENCE_S = 60.0  # how long a file that another host has written may stay as it is before it counts as left behind


class Lock:
    """A folder that belongs to this process until `release`."""

    def __init__(self, folder: Path) -> None:
        """Take the folder.

        Raises:
            ConfigError: another process has it; host and process are named.
        """
        self.path = folder / FILE
        self._handle = _flock(folder)
        self._mine: dict[str, Any] = {
            "host": socket.gethostname(),
            "system": _system(),
            "pid": os.getpid(),
            "started": _started("self"),
        }
        self._mine["token"] = uuid.uuid4().hex
        self._released = threading.Event()
        try:
            self._take()
            for partial in folder.glob(f"{FILE}-*"):  # of a process that was killed while it wrote
                partial.unlink(missing_ok=True)
        except BaseException:
            os.close(self._handle)
            raise
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that nobody else has taken the folder since, believing that this process was gone.

        Raises:
            ConfigError: somebody has.
        """
        found = _read(self.path)
        if found is not None and found.get("token") != self._mine["token"]:
            raise ConfigError(f"{_name(found)} has taken over {self.path.parent}; this process ends, that one goes on")

    def release(self) -> None:
        """Let go of the folder."""
        if self._released.is_set():
            return
        self._released.set()
        self._thread.join()
        found = _read(self.path)
        if found is not None and found.get("token") == self._mine["token"]:
            self.path.unlink(missing_ok=True)
        os.close(self._handle)

    def _take(self) -> None:
        found = _read(self.path)
        if found is None and self._created():
            return
        for _ in range(10):  # made by somebody at this moment, who has not written it yet; or damaged
            if found is None:
                time.sleep(HEARTBEAT_S / 20)
                found = _read(self.path)
        if found is not None and _is_alive(self.path, found):
            raise ConfigError(
                f"{_name(found)} is training in {self.path.parent}; wait for it, or choose another --run. If you know "
                f"that it is gone, remove {self.path}"
            )
        self._write(0)
        time.sleep(0.2)  # two that found the same file left behind: the last one has it
        self.check()

    def _created(self) -> bool:
        """Make the file, unless there is one: of several hosts that start at once one succeeds."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._text(0))
        return True

    def _beat(self) -> None:
        count = 1
        while not self._released.wait(HEARTBEAT_S):
            found = _read(self.path)
            if found is not None and found.get("token") != self._mine["token"]:
                return  # `check` tells it
            with contextlib.suppress(OSError):  # a full disk, say: the next beat tries again
                self._write(count)
            count += 1

    def _write(self, count: int) -> None:
        """Replace the file; it is not flushed to the disk, which may take long, since only others' eyes matter."""
        partial = self.path.with_name(f"{self.path.name}-{self._mine['token'][:8]}")
        try:
            partial.write_text(self._text(count), encoding="utf-8")
            partial.replace(self.path)
        finally:
            partial.unlink(missing_ok=True)

    def _text(self, count: int) -> str:
        return files.line({**self._mine, "heartbeat": count})


def _flock(folder: Path) -> int:
    """Lock the folder between the processes of this host, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        found = _read(folder / FILE)
        who = "another process" if found is None else _name(found)
        raise ConfigError(f"{who} is training in {folder}; wait for it, or choose another --run") from None
    except OSError:
        pass  # this file system has no locks: the file beside is all there is
    return handle


def _is_alive(path: Path, found: dict[str, Any]) -> bool:
    """Say whether the process that wrote a lock is there: by its number on this system, else by its heartbeat."""
    if found.get("system") == _system():
        return _started(str(found.get("pid"))) == found.get("started") != ""
    deadline, num_missing = time.monotonic() + PATIENCE_S, 0
    while time.monotonic() < deadline and num_missing < 3:  # one reading may fail while the file is replaced
        time.sleep(HEARTBEAT_S / 4)
        now = _read(path)
        if now is not None and now != found:
            return True
        num_missing = num_missing + 1 if now is None else 0
    return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _name(found: dict[str, Any]) -> str:
    return f"process {found.get('pid')} on host {found.get('host')}"


def _system() -> str:
    """Name what process numbers are unique in: this start of this machine, or a container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: str) -> str:
    """Return when a process of this system started, as the kernel counts; "" where there is none or it has ended."""
    try:
        status = Path("/proc", pid, "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return "" if status[0] in "ZX" else status[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(int(pid) if pid != "self" else os.getpid(), 0)
    except PermissionError:
        return "running"
    except (OSError, ValueError):
        return ""
    return "" if Path("/proc/self/stat").exists() else "running"


def holder(folder: Path) -> str:
    """Name the process that has a folder, "" if none has: of another host, one whose file is of the last minute."""
    path = folder / FILE
    found = _read(path)
    if found is None:
        return ""
    if found.get("system") == _system():
        return _name(found) if _started(str(found.get("pid"))) == found.get("started") != "" else ""
    try:
        return _name(found) if time.time() - path.stat().st_mtime < PATIENCE_S else ""
    except OSError:
        return ""
