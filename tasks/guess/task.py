"""Guess a hidden number in as few as 20 questions: the environment says higher or lower; guess:N hides one up to N."""

import random
import re
from collections.abc import Generator, Sequence
from zlib import crc32

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Done, Generated, Problem

VERSION = "1"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 64
TEMPLATE = "chat"
MAX_TURNS = 30

HIGHEST, SIZES = 1_000_000, {"train": 10_000, "test": 500}
MAX_DIGITS = 18
_QUESTION = (
    "I think of a whole number from 1 to {highest}. Find it: answer with one number at a time, and I say whether mine "
    "is higher or lower."
)


def problems(split: str, data: str = "", argument: str = "") -> Sequence[Problem]:
    """Hide numbers; the argument is the highest one. Needs no data."""
    if data:
        raise TaskError(f"task guess hides its own numbers and takes no data; got {data!r}")
    if argument and not (argument.isascii() and argument.isdecimal() and 100 <= int(argument[:MAX_DIGITS]) < 10**15):
        raise TaskError(f"guess:N takes the highest number, from 100 on, as in guess:1000; got {argument!r}")
    highest = int(argument or HIGHEST)
    return Generated(lambda index: _problem(split, index, highest), SIZES[split])


def environment(problem: Problem) -> Generator[str | None, str, Done]:
    """Compare the last number of each answer with the hidden one."""
    answer = yield None
    while (guess := _number(answer)) != problem.meta["hidden"]:
        if guess is None:
            answer = yield "Answer with a number."
        else:
            answer = yield "Higher." if problem.meta["hidden"] > guess else "Lower."
    return Done(1.0)


def _number(answer: str) -> int | None:
    found = re.findall(r"[0-9]+", answer[-1000:].replace(",", ""))
    return int(found[-1][:MAX_DIGITS]) if found else None


def _problem(split: str, index: int, highest: int) -> Problem:
    rng = random.Random(f"guess {VERSION} {split} {index} {highest}")
    hidden = next(
        n for n in iter(lambda: rng.randint(1, highest), 0) if (crc32(b"%d" % n) % 5 == 0) == (split == "test")
    )
    return Problem(_QUESTION.format(highest=highest), "\n".join(_halving(hidden, highest)), {"hidden": hidden})


def _halving(hidden: int, highest: int) -> list[str]:
    low, high, guesses = 1, highest, [(1 + highest) // 2]
    while guesses[-1] != hidden:
        low, high = (guesses[-1] + 1, high) if hidden > guesses[-1] else (low, guesses[-1] - 1)
        guesses.append((low + high) // 2)
    return [str(guess) for guess in guesses]
