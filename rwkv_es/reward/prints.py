"""What rewards print, shown: with a name before it, and never more than people can read."""

import os
import sys
import threading
import time
from collections.abc import Sequence

from rwkv_es.system.texts import printable

LINES, PERIOD_S = 20, 10.0  # so many lines in such a time; of the others the number is shown
MAX_LINE_BYTES = 300
_CHUNK_BYTES = 1 << 16


class Prints:
    """Shows the lines of several processes; may be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began, self._num_shown, self._num_left_out = -PERIOD_S, 0, 0

    def follow(self, handle: int) -> None:
        """Show what comes out of a pipe until it is closed; it is read to its end, so that nobody waits to print."""
        threading.Thread(target=self._follow, args=(handle,), daemon=True).start()

    def _follow(self, handle: int) -> None:
        rest = b""
        while chunk := os.read(handle, _CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[:MAX_LINE_BYTES]
            if lines:
                self.show(lines)
        if rest:
            self.show([rest])
        os.close(handle)

    def show(self, lines: Sequence[bytes]) -> None:
        """Show lines, but for those that come after many others."""
        with self._lock:
            if time.monotonic() - self._began >= PERIOD_S:
                if self._num_left_out:
                    self._write(f"... {self._num_left_out} more lines")
                self._began, self._num_shown, self._num_left_out = time.monotonic(), 0, 0
            room = max(0, LINES - self._num_shown)
            for line in lines[:room]:
                self._write(line[:MAX_LINE_BYTES].decode("utf-8", "backslashreplace").rstrip("\r"))
            self._num_shown += len(lines[:room])
            self._num_left_out += len(lines[room:])

    def _write(self, line: str) -> None:
        print(f"reward: {printable(line)}", file=sys.stderr, flush=True)
