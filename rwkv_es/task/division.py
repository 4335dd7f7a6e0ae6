"""Data without splits of their own, divided by a hash of each question."""

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, TypeVar

from rwkv_es.task.task import Problem

HELD_OUT_SHARE = 0.1
T = TypeVar("T")
FEWEST = 4  # questions of which some are held out
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
    """Return the side for "train" or "test" of problems that come as one, from a file of that name, say."""
    if (count := len(set(map(question_of, problems)))) < FEWEST:
        what = "one problem, which is" if count == 1 else f"{count} problems, too few to be divided, which are"
        return Side(problems, problems, f"{source} holds {what} trained on and held out alike")
    train, test = divided(problems, question_of)
    words = (
        f"{source} has no splits: {len(train):,} problems are for training, {len(test):,} held out, by a hash of the "
        "question"
    )
    if len(test) < FEW:
        words += "; so few say little: give more, or a folder with train.jsonl and test.jsonl"
    return Side(train if split == "train" else test, problems, words)


def divided(items: Sequence[T], question: Callable[[T], str]) -> tuple[Sequence[T], Sequence[T]]:
    """Return what is for training and what is held out, by a hash of each one's question.

    So the side of one depends on no other, and on no order. Where the hash holds out none or all, the one with the
    smallest is held out, or the one with the largest trained on; a single question stands on both sides.
    """
    places = [hashed(f"question {question(item)}") for item in items]
    known = sorted(set(places))
    if len(known) < 2:
        return items, items
    end = min(max(HELD_OUT_SHARE, known[1]), known[-1])  # held out is what lies below
    train = [item for item, place in zip(items, places) if place >= end]
    return train, [item for item, place in zip(items, places) if place < end]


def question_of(problem: Problem) -> str:
    """Return what makes two problems the same: the question, however its words are spaced; of a mere text, that."""
    return " ".join((problem.prompt or problem.answer).split())


def hashed(text: str) -> float:
    """Return a number in [0,1) that depends on the text alone."""
    digest = sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
