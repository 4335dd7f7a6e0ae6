"""Texts told again in other spellings, by fingerprints that do not hold the texts."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5  # words or digits in a row
SHARE = 0.6  # of a fingerprint, from which on a text is told
MIN_TEXT_CHARS = 60  # no problem is shorter
MAX_TEXT_CHARS = 50_000  # of a text that is looked through
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")  # of LaTeX; how a formula is set differs from source to source
_TOKEN = re.compile(r"[a-z]+|[0-9]")


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
