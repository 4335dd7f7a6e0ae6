"""What people hand over as texts and paths: one reader of text files, one expander of `~`, values cut for messages."""

import os
import re
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import ConfigError

LARGEST = 256 << 20  # bytes of a text file, if nothing else is said
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}
_COMMANDS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}
_HOME = re.compile(r"(?:^|(?<=[,=]))~[^/,=:]*")


def read_text(path: str | Path, what: str, most: int = LARGEST) -> str:
    """Read a text file as it is but for a byte order mark, which is dropped. `what` names it in messages.

    Raises:
        ConfigError: there is no such file, it is no regular file, has more than `most` bytes, or is no UTF-8.
    """
    file = Path(expanded(str(path)))
    try:
        mode = os.stat(file).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise ConfigError(f"{what} {file} is {kind}; give a text file")
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except (OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(f"{what} {str(file)[:300]} cannot be read ({reason})") from None
    if len(data) > most:
        raise ConfigError(f"{what} {file} is larger than {most:,} bytes, more than such a file may have")
    return decoded(data, f"{what} {file}")


def decoded(data: bytes, what: str) -> str:
    """Return a file's bytes as text, without a byte order mark.

    Raises:
        ConfigError: they are no UTF-8.
    """
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            raise ConfigError(f"{what} is {name}; save it as UTF-8")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{what} is no UTF-8 (byte {data[error.start]:#04x} in line {line}); save it so") from None


def expanded(path: str) -> str:
    """Return a path with `~` and `~user` at its start as that home.

    Raises:
        ConfigError: there is no such user, or a character that no path can have.
    """
    if "\0" in path:
        raise ConfigError(f"a path must not hold the character NUL; got {shown(path)}")
    return _HOME.sub(lambda found: _home(found[0]), path, count=1) if path.startswith("~") else path


def all_expanded(spec: str) -> str:
    """Return the paths of `a=~/x,~/b.py:f=0.5` so, each of them."""
    return _HOME.sub(lambda found: _home(found[0]), spec)


def _home(word: str) -> str:
    home = os.path.expanduser(word)
    if home.startswith("~"):
        raise ConfigError(f"there is no home folder {word!r}; write the path out")
    return home


def printable(text: str) -> str:
    """Return a text without the characters by which programs command a terminal; line ends and tabs stay."""
    return text.translate(_COMMANDS)


def without_surrogates(text: str) -> str:
    """Make each lone surrogate U+FFFD, and a pair the character that it spells."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def shown(value: Any) -> str:
    """Return a value as a message shows it: not more than a line, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    try:
        return short.repr(value)
    except (ValueError, RecursionError, UnicodeError):  # an integer of thousands of digits, say
        return f"a {type(value).__name__} that is too long to show"


def size(num_bytes: float) -> str:
    """Write a number of bytes: 950 B, 12.3 kB, 4.56 MB, 14.4 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    digits = 0 if unit == "B" or num_bytes >= 99.95 else 1 if num_bytes >= 9.995 else 2
    return f"{num_bytes:.{digits}f} {unit}"


def text_of(value: Any) -> str:
    """Write an option's value as people do."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={text_of(part)}" for name, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
