"""How an option is declared, once: default, help, bounds, choices, the commands that have it, what resume allows."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import all_expanded, expanded, shown

# Whether an option may change when a run continues: "free": it never changes the weights; "fork": only in a fork,
# before its first own step; "same": never, since the weights of past steps are a function of it.
LARGEST = 2**62  # whole number: larger ones do not fit in what counts them
MOST_NEW, MOST_SAMPLES = 1 << 20, 1 << 12  # tokens of a completion, samples: so many have noise of their own
MOST_ANSWERS, MOST_SLOTS = 1 << 24, 1 << 22  # of a step, in flight: more have never been asked for
TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")
ON_RESUME = ("free", "fork", "same")


def option(
    default: Any,
    text: str,
    verbs: str = "train",
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    on_resume: str = "fork",
    paths: str = "",
    formerly: str = "",
) -> Any:
    """Declare an option of some verbs (their names with blanks between). A mapping as default is copied.

    paths: "one" or "many", where `~` means home: at the start, or also behind `,` and `=`. formerly: its name in an
    earlier release, which goes on working.
    """
    assert on_resume in ON_RESUME
    metadata = {
        "help": text,
        "verbs": tuple(verbs.split()),
        "above": above,
        "at_least": at_least,
        "at_most": at_most,
        "choices": choices,
        "on_resume": on_resume,
        "paths": paths,
        "formerly": formerly,
    }
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(f: Field[Any]) -> Any:
    """Return an option's default."""
    return f.default_factory() if f.default is MISSING and f.default_factory is not MISSING else f.default


def check(f: Field[Any], value: Any) -> None:
    """Refuse a value that an option does not allow.

    Raises:
        ConfigError: it is not among the choices or outside of the bounds.
    """
    above, at_least, at_most, choices = (f.metadata[key] for key in ("above", "at_least", "at_most", "choices"))
    if choices and value not in choices:
        raise ConfigError(f"{f.name} must be one of {', '.join(choices)}; got {shown(value)}")
    if at_most is not None and above is not None and not above < value <= at_most:
        raise ConfigError(f"{f.name} must lie in ({above:g}, {at_most:g}]; got {value}")
    at_most = LARGEST if at_most is None and isinstance(value, int) else at_most
    if at_most is not None and not value <= at_most:
        raise ConfigError(f"{f.name} must be at most {at_most}; got {value}")
    if above is not None and not value > above:
        raise ConfigError(f"{f.name} must be above {above:g}; got {value}")
    if at_least is not None and not value >= at_least:
        raise ConfigError(
            f"{f.name} must {'not be negative' if not at_least else f'be at least {at_least:g}'}; got {value}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{f.name} must be a finite number; got {value}")


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the allowed one that is meant, or all of them."""
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"it may be {', '.join(allowed)}"


def convert(f: Field[Any], value: Any) -> Any:
    """Convert a flag's string or a file's value to the type of the option's default.

    Raises:
        ConfigError: it is no such value.
    """
    to_type, wanted = _CONVERTERS[type(default_of(f))]
    try:
        is_count = (
            isinstance(value, int) and not isinstance(value, bool) and default_of(f) == "0"
        )  # shots: 2, in a file
        found = str(value) if is_count else to_type(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{f.name} must be {wanted}; got {shown(value)}") from None
    if isinstance(found, str) and "\0" in found:
        raise ConfigError(f"{f.name} must not hold the character NUL; got {shown(value)}")
    return at_home(f, found)


def at_home(f: Field[Any], value: Any) -> Any:
    """Return an option's value with `~` as the home folder, if it holds paths.

    Raises:
        ConfigError: there is no such home.
    """
    expand = {"one": expanded, "many": all_expanded}.get(f.metadata["paths"])
    return expand(value) if expand is not None and isinstance(value, str) else value


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def _to_str(value: Any) -> str:
    if not isinstance(value, (str, Path)):
        raise ValueError
    return str(value)


def _to_targets(value: Any) -> dict[str, float]:
    is_mapping = isinstance(value, Mapping)
    pairs = list(value.items() if is_mapping else (part.split("=") for part in _to_str(value).split(",")))
    targets = {str(name).strip(): _to_float(multiplier) for name, multiplier in pairs}
    if len(targets) < len(pairs) or "" in targets:
        raise ValueError
    return targets


_CONVERTERS: dict[type, tuple[Callable[[Any], Any], str]] = {
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
    bool: (_to_bool, "true or false"),
    str: (_to_str, "text"),
    dict: (_to_targets, "name=multiplier,name=multiplier with each name once"),
}
