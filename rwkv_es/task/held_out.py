"""What a row of a data set says of where it is from, anywhere in it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

HELD_OUT_YEARS = (2024, 2025)  # of AIME: kept for evaluation alone
MAX_LABEL_CHARS = 200
_MAX_DEPTH = 8
_YEARS = "|".join(map(str, HELD_OUT_YEARS))
_SHORT_YEARS = "|".join(str(year % 100) for year in HELD_OUT_YEARS)
_NAME = r"(?<![a-z])aime(?:i{1,2})?(?![a-z])"
_AIME = re.compile(rf"{_NAME}|american invitational mathematics", re.IGNORECASE)
_OF_YEAR = re.compile(rf"(?<![0-9])(?:{_YEARS})(?![0-9])")
_SAYS_BOTH = re.compile(
    rf"{_NAME}\D{{0,12}}(?:{_YEARS})(?![0-9])|(?<![0-9])(?:{_YEARS})\D{{0,3}}{_NAME}"
    rf"|^(?:{_YEARS})[-_ /]I{{1,2}}[-_ /][0-9]{{1,2}}$",
    re.IGNORECASE,
)
_SAYS_SHORT = re.compile(rf"(?<![a-z])aime[-_ ']{{0,2}}(?:{_SHORT_YEARS})(?![0-9])", re.IGNORECASE)
_NUMBERING = re.compile(r"(?:^|_|[a-z])(?:id|idx|index|no|number)$", re.IGNORECASE)


def texts_of(row: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a row with the names of their columns: also those in messages and nested columns."""
    yield from ((name, str(value)) for name, value in _leaves(row, "", 0))


def says_held_out(row: Mapping[Any, Any]) -> bool:
    """Tell by what a row says of itself, in labels, names of sources and years, that it is of AIME 2024 or 2025."""
    labels = [(name, text) for name, text in texts_of(row) if len(text) <= MAX_LABEL_CHARS]
    if any(_SAYS_BOTH.search(text) for _, text in labels):
        return True
    if any(_SAYS_SHORT.search(text) and not _NUMBERING.search(name) for name, text in labels):
        return True
    is_of_year = any(_OF_YEAR.search(text) for name, text in labels if "year" in name.lower() or "date" in name.lower())
    return is_of_year and any(_AIME.search(part) for label in labels for part in label)


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth < _MAX_DEPTH:
        for key, part in value.items():
            yield from _leaves(part, str(key), depth + 1)
    elif isinstance(value, (list, tuple)) and depth < _MAX_DEPTH:
        for part in value:
            yield from _leaves(part, name, depth + 1)
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        yield name, value
