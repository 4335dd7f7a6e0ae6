"""Standard output and error that never end a run: what cannot be shown is escaped, what cannot be written is lost."""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rwkv_es.system.texts import printable


class _Unfailing(io.RawIOBase):
    """An open file that takes all that is written; `error` is why the first of it was lost."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._handle, rest) :]
            except BlockingIOError:  # a pipe that another program has made so
                select.select([], [self._handle], [])
            except OSError as error:  # closed by its reader, a full disk, ...
                self.error = self.error or error
                break
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return os.isatty(self._handle)


def make_unfailing() -> None:
    """Let everything that is printed from now on, by whomever, be unable to fail. Streams of tests are left alone."""
    if None in (sys.stdin, sys.stdout, sys.stderr):  # closed: the next file to be opened would get what is printed
        while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(handle)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  until the end: nobody is there to be asked
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            made = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  until the end
            setattr(sys, name, made)
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _unfailing(stream))


def _unfailing(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    try:
        raw = _Unfailing(stream.fileno())
    except OSError:  # no file
        return stream
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def lost_output() -> str:
    """Return why a part of standard output is lost; "" if none is, or its reader has seen enough (`| head`)."""
    stream: Any = sys.stdout
    if stream is None or stream.closed:  # by a reward that was tried here
        return ""
    stream.flush()
    raw = getattr(getattr(stream, "buffer", None), "raw", getattr(stream, "buffer", None))
    error = raw.error if isinstance(raw, _Unfailing) else None
    return "" if error is None or error.errno == errno.EPIPE else os.strerror(error.errno or 0)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show on stderr, if that is a terminal, what is under way and for how long; nothing in pipes and logs."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        bar.add_task(printable(text), total=None)
        yield
