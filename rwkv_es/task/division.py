"""Data without splits of their own, divided by a hash of each question."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from rwkv_es.task.task import Problem

HELD_OUT_SHARE = 0.1
FEW = 10  # held-out problems, of which fewer say little


class Side(Sequence[Problem]):
    """One side of problems that come without splits: those to train on, or those that are held out."""

    def __init__(self, problems: Sequence[Problem], whole: Sequence[Problem], words: str) -> None:
        self._problems, self.whole, self.words = problems, whole, words  # both sides; how they were divided

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, index: Any) -> Any:
        return self._problems[index]


def side_of(problems: Sequence[Problem], split: str, source: str) -> Side:
    """Return the side for "train" or "test" of problems that come as one, from a file of that name, say.

    Which side a problem is on depends on its question alone: on no other line, and on no order. Where the hash holds
    out none or all, the problem with the smallest hash is held out, or the one with the largest is trained on; a
    single problem stands on both sides.
    """
    places = [place_of(problem) for problem in problems]
    known = sorted(set(places))
    if len(known) < 2:
        return Side(problems, problems, f"{source} holds one problem, which is trained on and held out alike")
    end = min(max(HELD_OUT_SHARE, known[1]), known[-1])  # held out is what lies below
    sides = {"train": [p for p, at in zip(problems, places) if at >= end], "test": []}
    sides["test"] = [p for p, at in zip(problems, places) if at < end]
    num_held_out = len(sides["test"])
    words = (
        f"{source} has no splits: {len(sides['train']):,} problems are for training, {num_held_out:,} held out, by "
        "a hash of the question"
    )
    if num_held_out < FEW:
        words += "; so few say little: give more, or a folder with train.jsonl and test.jsonl"
    return Side(sides[split], problems, words)


def place_of(problem: Problem) -> float:
    """Return a problem's place in [0,1): that of its question, however the words are spaced."""
    return hashed(f"question {' '.join((problem.prompt or problem.answer).split())}")


def hashed(text: str) -> float:
    """Return a number in [0,1) that depends on the text alone."""
    digest = sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
