"""What an environment says to an answer: a text, a text with a reward, or that the episode is over."""

import math
from types import ModuleType
from typing import Any, NamedTuple

from rwkv_es.config.option import MOST_NEW
from rwkv_es.config.options import Config
from rwkv_es.system.errors import TaskError

MAX_TURNS = 16  # of a task that does not say


class Reply(NamedTuple):
    """A text for the model to read, and what the turn earned. A plain string earns nothing."""

    text: str
    reward: float = 0.0


class Done(NamedTuple):
    """The end of an episode, and what it earns besides what its turns did. None: not applicable."""

    reward: float | None
    text: str = ""  # last words, for people: the model does not read them


class Limits(NamedTuple):
    """How far an episode may go. Where it is cut off, it keeps what its turns have earned."""

    turns: int  # answers
    tokens: int  # of answers and replies together
    seconds: float = math.inf  # that the environment thinks, all in all


class Setting(NamedTuple):
    """How the episodes of a task go."""

    response_prefix: str
    stop: tuple[str, ...]
    stop_included: tuple[str, ...]
    turn: str  # what stands around a reply, {q}
    limits: Limits


ONE_TURN = Limits(1, MOST_NEW)  # of a task without an environment


def default_limits(max_new_tokens: int, turns: int = MAX_TURNS) -> Limits:
    """Return the limits of a task that gives no others: room for replies as long as the answers."""
    return Limits(turns, min(2 * turns * max_new_tokens, MOST_NEW))


def limited(limits: Limits, max_new_tokens: int, given: Limits) -> Limits:
    """Return the limits of a task with those that are given instead (0: none is), for answers of so many tokens."""
    turns = given.turns or limits.turns
    is_changed = given.turns and not given.tokens
    tokens = default_limits(max_new_tokens, turns).tokens if is_changed else given.tokens or limits.tokens
    return Limits(turns, tokens, given.seconds or limits.seconds)


def given_limits(config: Config) -> Limits:
    """Return the limits that the options give (0: none is)."""
    return Limits(config.max_turns, config.max_episode_tokens, config.max_episode_seconds)


def limits_of(module: ModuleType, spec: str, max_new_tokens: int) -> Limits:
    """Read and check what a task with an environment says of its episodes.

    Raises:
        TaskError: a limit is no number above 0, or too large.
    """
    turns = _whole(module, "MAX_TURNS", spec, MAX_TURNS)
    default = default_limits(max_new_tokens, turns)
    seconds: Any = getattr(module, "MAX_EPISODE_S", math.inf)
    if not (isinstance(seconds, (int, float)) and seconds > 0):
        raise TaskError(f"MAX_EPISODE_S of task {spec} must be a number of seconds above 0; got {seconds!r}")
    return Limits(turns, _whole(module, "MAX_EPISODE_TOKENS", spec, default.tokens), float(seconds))


def _whole(module: ModuleType, name: str, spec: str, default: int) -> int:
    value = getattr(module, name, default)
    if not (isinstance(value, int) and 0 < value <= MOST_NEW):
        raise TaskError(f"{name} of task {spec} must be a whole number from 1 to {MOST_NEW}; got {value!r}")
    return value
