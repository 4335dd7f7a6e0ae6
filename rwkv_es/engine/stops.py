"""Where a completion ends: at the end token, before or after a string."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_es.pretrained.tokenizer import Tokenizer


class Stops(NamedTuple):
    """Where a completion stops: at the end token, or where its bytes contain one of the strings."""

    end_id: int
    strings: tuple[bytes, ...]
    can_end: np.ndarray  # (n_vocab,) bool: the token could complete one of the strings
    token_bytes: Sequence[bytes]

    def hit(self, ids: Sequence[int]) -> bool:
        """Say whether the last token of `ids` completes a stop string. Asked only where `can_end[ids[-1]]`."""
        longest = max(map(len, self.strings), default=0)
        text = self.token_bytes[ids[-1]]
        enough = len(text) + longest - 1
        for token in reversed(ids[:-1]):
            if len(text) >= enough:
                break
            text = self.token_bytes[token] + text
        return any(string in text for string in self.strings)


def make_stops(tokenizer: Tokenizer, strings: Sequence[str]) -> Stops:
    """Prepare stop strings for a tokenizer."""
    wanted = tuple(string.encode() for string in strings if string)
    can_end = np.array([any(_can_end(data, string) for string in wanted) for data in tokenizer.token_bytes], dtype=bool)
    return Stops(tokenizer.end_id, wanted, can_end, tokenizer.token_bytes)


def cut(text: str, stop: Sequence[str], stop_included: Sequence[str] = ()) -> str:
    """Return the text before the first `stop` string or after the first `stop_included`, whichever comes first."""
    lengths = [text.index(string) for string in stop if string and string in text]
    lengths += [text.index(string) + len(string) for string in stop_included if string in text]
    return text[: min(lengths)] if lengths else text


def _can_end(data: bytes, string: bytes) -> bool:
    """Say whether a text that continues with `data` could complete `string` there."""
    return string in data or any(data.startswith(string[i:]) for i in range(1, len(string)))


def distinct(kinds: Sequence[Stops | None], otherwise: Stops) -> tuple[list[Stops], list[int]]:
    """Return the distinct ones among `kinds` (None: `otherwise`), and the place of each among them."""
    found: dict[tuple[bytes, ...], Stops] = {otherwise.strings: otherwise}
    for stops in kinds:
        if stops is not None:
            found.setdefault(stops.strings, stops)
    place = {strings: i for i, strings in enumerate(found)}
    return list(found.values()), [place[(stops or otherwise).strings] for stops in kinds]
