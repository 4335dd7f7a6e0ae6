"""Files that survive a crash: JSON lines that are only appended to, small files that are replaced whole."""

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import ConfigError


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


def stream_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield a file's JSON lines, as they are and parsed, one at a time; a last line that a crash has torn is left out.

    Raises:
        ConfigError: another line is broken.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            row = _parse(text) if text.endswith(b"\n") else None
            if row is not None:
                yield text, row
            elif file.read(1):
                raise ConfigError(f"{path} line {number} is broken; restore the file, or choose another --run")


def read_sound_lines(path: Path, most: int = 0) -> list[dict[str, Any]]:
    """Read a file of JSON lines that nothing depends on, or its last `most` bytes: damaged ones are left out."""
    data = b""
    if path.exists():
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most) if most else 0)
            data = file.read()
    return [row for text in data.split(b"\n") if (row := _parse(text)) is not None]


def keep_lines_(path: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop rows from a file of JSON lines, and what a crash has torn at its end; damaged lines stay as they are.

    Raises:
        ConfigError: the file cannot be written.
    """
    data = path.read_bytes() if path.exists() else b""
    *lines, tail = data.split(b"\n")
    kept = [text for text in lines if (row := _parse(text)) is None or is_kept(row)]
    if len(kept) < len(lines) or tail:
        with writing(path):
            _replace(path, b"".join(text + b"\n" for text in kept))


def is_finite(value: Any) -> bool:
    """Say whether something that a file holds is a number to calculate with: not infinite, nor beyond a float."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    """Say whether something that a file holds is a number of steps."""
    return type(value) is int and 0 <= value < 1 << 53


def line(row: Mapping[str, Any]) -> str:
    """Return a row as one JSON line: floats exactly, what is not finite as null."""
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    _replace(path, _encode(text))


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".partial-{path.name}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make what was created and renamed in a folder survive a power cut, where its file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):  # CIFS, sshfs and others
            raise
    finally:
        os.close(handle)


def refuse_existing(path: Path) -> None:
    """Before any work: make sure that an output can be written, and that nothing of anybody's is replaced.

    Raises:
        ConfigError: there is something already, or its folder is not there or cannot be written.
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already; choose another --out, or remove it first")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: {folder} is no folder; make it, or choose another --out")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {folder} does not allow it; choose another --out")


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
        raise ConfigError(f"cannot write {path} ({reason}); make room there, or choose another place") from None


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """Remove a folder that could not be written to its end: of a full disk it would take the last room."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
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
