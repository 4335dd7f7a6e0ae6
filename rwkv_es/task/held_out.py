"""Texts told again in other spellings, by fingerprints without the texts; and what a row says of where it is from."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

HELD_OUT_YEARS = (2024, 2025)  # of AIME: kept for evaluation alone
SHINGLE = 5  # words or digits in a row
SHARE = 0.6  # of a fingerprint, from which on a text is told
MAX_LABEL_CHARS = 200
MIN_TEXT_CHARS = 60  # no problem is shorter
MAX_TEXT_CHARS = 50_000  # of a text that is looked through
_MAX_DEPTH = 8
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")  # of LaTeX; how a formula is set differs from source to source
_TOKEN = re.compile(r"[a-z]+|[0-9]")
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


def fingerprint(text: str) -> NDArray[np.uint32]:
    """Return a hash of every five words or digits in a row: no drawings, formulas without their commands."""
    if len(text) < MIN_TEXT_CHARS:
        return np.empty(0, np.uint32)
    tokens = _TOKEN.findall(_COMMAND.sub(" ", _DRAWING.sub(" ", text[:MAX_TEXT_CHARS])).lower())
    codes = np.fromiter(map(_code, tokens), np.uint64, len(tokens))
    count = max(0, len(tokens) - SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    for first in range(SHINGLE):  # a polynomial, modulo 2^64
        hashes = hashes * _FACTOR + codes[first : first + count]
    return (hashes >> np.uint64(32)).astype(np.uint32)


@lru_cache(maxsize=1 << 16)
def _code(token: str) -> int:
    return crc32(token.encode())


class Fingerprints:
    """Known texts by their fingerprints: name -> one per wording, each as hexadecimal digits, eight an entry."""

    def __init__(self, known: Mapping[str, Iterable[str]]) -> None:
        pairs = [(name, np.frombuffer(bytes.fromhex(digits), ">u4")) for name, each in known.items() for digits in each]
        self._names = [name for name, _ in pairs]
        self._sizes = np.array([len(hashes) for _, hashes in pairs], np.int64)
        wordings = np.repeat(np.arange(len(pairs)), self._sizes)
        hashes = np.concatenate([np.empty(0, np.uint32), *(hashes for _, hashes in pairs)]).astype(np.uint32)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._wordings = hashes[order], wordings[order]

    def find(self, text: str) -> str | None:
        """Return the name of the known text that is, or stands in, a text; None if there is none."""
        found = fingerprint(text)
        if not (len(found) and len(self._hashes)):
            return None
        first, end = (np.searchsorted(self._hashes, found, side) for side in ("left", "right"))
        places = {place for i in np.flatnonzero(first < end) for place in range(first[i], end[i])}
        if not places:
            return None
        shares = np.bincount(self._wordings[list(places)], minlength=len(self._sizes)) / self._sizes
        best = int(shares.argmax())
        return self._names[best] if shares[best] >= SHARE else None


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
