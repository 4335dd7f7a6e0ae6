"""The errors a user can meet. Each message says what was wrong, what is allowed and what to do."""

import os
import traceback

_LIBRARIES = f"{os.sep}site-packages{os.sep}"
MAX_CAUSE_CHARS = 300
_MOST_FRAMES = 5  # of the user's own: the first and the last ones


class RwkvEsError(Exception):
    """Base of every error that is the user's to mend; the command line prints it in one line and exits with 2."""


class ConfigError(RwkvEsError):
    """An option is unknown, out of range, or does not fit another one."""


class CheckpointError(RwkvEsError):
    """A file is not an RWKV-7 (x070) checkpoint that can be used, or cannot be written."""


class TaskError(RwkvEsError):
    """A task or its data cannot be loaded."""


class RewardError(RwkvEsError):
    """A reward function failed in a way that makes training meaningless."""


class ClusterError(RwkvEsError):
    """Processes that train together have lost one of them, or differ."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): what it is at is abandoned, what is on the disk stays good."""


def in_plain_words(error: BaseException) -> str:
    """Say in one sentence what the machine lacks or a file is about; "" for a bug, whose traceback is wanted."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said:
        return "out of memory; free some, lower --slots, or take a smaller model"
    if isinstance(error, RecursionError):
        return f"something is nested too deep to be read ({said}); look at the files that the options name"
    if isinstance(error, UnicodeError):
        return f"a text cannot be read or written here ({said}); set PYTHONUTF8=1, or mend the text"
    if isinstance(error, OSError):
        files = " and ".join(repr(file) for file in (error.filename, error.filename2) if file is not None)
        return f"{error.strerror or said or type(error).__name__}{files and f': {files}'}; mend that and try again"
    if any(frame.name == "<module>" and _LIBRARIES in frame.filename for frame in _frames(error)):
        return f"a library cannot be loaded ({_in_a_line(error)}); {_library_advice(error)}"
    return ""


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def _library_advice(error: BaseException) -> str:
    """Name the environment variables that configure the library that an error comes from."""
    library = _frames(error)[-1].filename.partition(_LIBRARIES)[2].partition(os.sep)[0]
    found = [f"{name}={value}" for name, value in os.environ.items() if library and name.startswith(library.upper())]
    return f"unset {', '.join(found)}" if found else "install it anew, or unset environment variables that configure it"


def cause(error: BaseException) -> str:
    """Say in one line what a user's code raised, and the last line of the user's own that it came through."""
    try:
        said = _in_a_line(error)
        frames = _frames(_first(error))
    except Exception:  # noqa: BLE001  out of memory, or its own text cannot be made
        return type(error).__name__
    said = said if len(said) <= MAX_CAUSE_CHARS else f"{said[:MAX_CAUSE_CHARS]} ..."
    others = [frame for frame in frames if not _is_ours(frame.filename)]
    users = [frame for frame in others if not _is_installed(frame.filename)]
    if not others:
        return said
    frame = (users or others)[-1]
    return f"{said} ({os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name}: {frame.line})"


def own_traceback(error: BaseException) -> str:
    """Return what a user's code raised as a traceback of the user's own frames, of a few lines."""
    try:
        frames = _frames(_first(error))
        said = _in_a_line(error)
    except Exception:  # noqa: BLE001  out of memory, or its own text cannot be made
        return type(error).__name__
    others = [frame for frame in frames if not _is_ours(frame.filename)]
    users = [frame for frame in others if not _is_installed(frame.filename)] or others[-1:]
    if len(users) > _MOST_FRAMES:
        users = [users[0], *users[1 - _MOST_FRAMES :]]
    places = [f'File "{frame.filename}", line {frame.lineno}, in {frame.name}\n  {frame.line}' for frame in users]
    said = said if len(said) <= MAX_CAUSE_CHARS else f"{said[:MAX_CAUSE_CHARS]} ..."
    return "\n".join([*places, said])


def _first(error: BaseException) -> BaseException:
    """Return the first of a group of errors, as asyncio's TaskGroup raises them: it says what went wrong."""
    inner = getattr(error, "exceptions", None)
    if isinstance(inner, tuple) and inner and isinstance(inner[0], BaseException):
        return _first(inner[0])
    return error


def _in_a_line(error: BaseException) -> str:
    if (first := _first(error)) is not error:
        return f"{_in_a_line(first)} (in: {type(error).__name__}: {error})"
    if isinstance(error, SyntaxError):
        where = f" ({os.path.basename(error.filename or '')}, line {error.lineno}: {(error.text or '').strip()})"
        return f"{type(error).__name__}: {error.msg}{where if error.filename else ''}"
    lines = traceback.TracebackException(type(error), error, None).format_exception_only()
    said = " ".join(next(iter(lines)).split())
    return said.removeprefix(f"{type(error).__module__}.") if "rwkv_es" in type(error).__module__ else said


def _is_ours(file: str) -> bool:
    """Tell this package's modules, and what has no file, from a user's files and the built-in tasks."""
    here = os.path.dirname(os.path.dirname(__file__))
    return file.startswith("<") or (
        file.startswith(here + os.sep) and not file.startswith(os.path.join(here, "tasks") + os.sep)
    )


def _is_installed(file: str) -> bool:
    return file.startswith(os.path.dirname(os.__file__) + os.sep) or "site-packages" in file
