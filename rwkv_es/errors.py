"""The errors a user can meet. Each message says what was wrong, what is allowed and what to do."""

import os
import traceback

MAX_CAUSE_CHARS = 300


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


def cause(error: BaseException) -> str:
    """Say in one line what a user's code raised, and the last line of the user's own that it came through."""
    try:
        said = _in_a_line(error)
        frames = traceback.extract_tb(error.__traceback__)
    except Exception:  # noqa: BLE001  out of memory, or its own text cannot be made
        return type(error).__name__
    said = said if len(said) <= MAX_CAUSE_CHARS else f"{said[:MAX_CAUSE_CHARS]} ..."
    others = [frame for frame in frames if not _is_ours(frame.filename)]
    users = [frame for frame in others if not _is_installed(frame.filename)]
    if not others:
        return said
    frame = (users or others)[-1]
    return f"{said} ({os.path.basename(frame.filename)}, line {frame.lineno}, in {frame.name}: {frame.line})"


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        where = f" ({os.path.basename(error.filename or '')}, line {error.lineno}: {(error.text or '').strip()})"
        return f"{type(error).__name__}: {error.msg}{where if error.filename else ''}"
    lines = traceback.TracebackException(type(error), error, None).format_exception_only()
    said = " ".join(next(iter(lines)).split())
    return said.removeprefix(f"{type(error).__module__}.") if "rwkv_es" in type(error).__module__ else said


def _is_ours(file: str) -> bool:
    """Tell this package's modules, and what has no file, from a user's files and the built-in tasks."""
    here = os.path.dirname(__file__)
    return file.startswith("<") or (
        file.startswith(here + os.sep) and not file.startswith(os.path.join(here, "tasks") + os.sep)
    )


def _is_installed(file: str) -> bool:
    return file.startswith(os.path.dirname(os.__file__) + os.sep) or "site-packages" in file
