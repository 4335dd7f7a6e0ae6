"""Files that survive a crash: JSON lines that are only appended to, small files that are replaced whole, a lock."""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_es.errors import ConfigError


def append(path: Path, rows: Sequence[Mapping[str, Any]], flush: bool = False) -> None:
    """Append rows as JSON lines; with `flush` they are on the disk when this returns.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = "".join(line(row) for row in rows)
    with writing(path), path.open("ab") as file:
        file.write(_encode(text))
        if flush:
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON lines and the bytes that they take: a last line that a crash has torn is left out.

    Raises:
        ConfigError: another line is broken.
    """
    data = path.read_bytes() if path.exists() else b""
    *lines, tail = data.split(b"\n")  # what follows the last newline is torn
    rows, num_bytes = [], 0
    for number, text in enumerate(lines, 1):
        row = _parse(text)
        if row is None and (number < len(lines) or tail):
            raise ConfigError(f"{path} line {number} is broken; restore the file, or choose another --run")
        if row is not None:
            rows.append(row)
            num_bytes += len(text) + 1
    return rows, num_bytes


def recover_lines_(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; cut a torn last line off the file.

    Raises:
        ConfigError: another line is broken, or the file cannot be written.
    """
    rows, num_bytes = read_lines(path)
    if path.exists() and path.stat().st_size > num_bytes:
        with writing(path):
            os.truncate(path, num_bytes)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Return a row as one JSON line: floats exactly, what is not finite as null."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("wb") as file:
            file.write(_encode(text))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make what was created and renamed in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(folder: Path) -> int:
    """Take the folder for this process; closing the returned handle, or the process's end, lets go of it.

    Raises:
        ConfigError: another process has it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"another process is training in {folder}; wait for it, or choose another --run") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence why a file cannot be written.

    Raises:
        ConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot write {path} ({reason}); make room there, or choose another --run") from None


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its JSON escape


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
