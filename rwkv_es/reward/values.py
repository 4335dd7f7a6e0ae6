"""What rewards return, as numbers: of any library, in lists of any kind, at once or awaited."""

import inspect
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import lru_cache
from itertools import islice
from numbers import Real
from typing import Any

LARGEST = 1e30  # of a reward's size: float64 holds the sums and squares of such numbers, float32 the steps they make


def number(value: Any, what: str = "the reward") -> float | None:
    """Return a reward as a float: Python's, numpy's and torch's numbers, arrays of one entry; None stays None.

    Raises:
        TypeError, ValueError, OverflowError: it is none, or not finite, or beyond any use.
    """
    if value is None:
        return None
    if callable(getattr(value, "item", None)):  # arrays and tensors, on any device
        value = _only_entry(value, what)
    if not isinstance(value, (Real, Decimal)):
        raise TypeError(f"{what} must be a number or None (not applicable); got {type(value).__name__}")
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{what} must be finite, or None (not applicable); got {found}")
    if abs(found) > LARGEST:
        raise ValueError(f"{what} must lie between {-LARGEST:g} and {LARGEST:g}; got {found:g}")
    return found


def metric(value: Any) -> float | None:
    """Return what a reward logs as a number for the metrics; None if it is none."""
    try:
        return number(value)
    except (TypeError, ValueError, OverflowError):
        return None


def listed(values: Any, count: int) -> list[Any]:
    """Return the values of a reward of TRL's form: a list, an array, a tensor, or anything else to go through.

    Raises:
        ValueError: it has not one value per completion.
    """
    is_list = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping))
    try:
        found = list(islice(values, count + 1)) if is_list else []
    except TypeError:  # an array without dimensions
        found = []
    if len(found) != count:
        raise ValueError(
            f"a reward of TRL's form must return a list with one value per completion ({count}); got {values!r:.200}"
        )
    return [awaited(value) for value in found]


def awaited(value: Any) -> Any:
    """Wait for a coroutine; all of a process run in one event loop, so that clients may be kept between calls."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return event_loop().run_until_complete(wait())


@lru_cache(maxsize=1)
def event_loop() -> Any:
    """Return this process's event loop for rewards."""
    import asyncio

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


def _only_entry(value: Any, what: str) -> Any:
    try:
        return value.item()
    except (ValueError, RuntimeError, TypeError):
        shape = tuple(getattr(value, "shape", ()))
        raise TypeError(f"{what} must be one number; got {type(value).__name__} of shape {shape}") from None
