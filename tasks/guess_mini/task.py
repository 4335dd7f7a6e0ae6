"""Three hidden numbers found one after the other in 20 turns: what the embedded sister model was pretrained for.

A prompt such as ``12:`` says that the numbers lie from 12 to 74. Each answer is a number; the environment replies with
``+`` (the hidden one is higher), ``-`` (lower) or ``=`` (found, and now the next one). Halving takes 18 turns at most.
"""

import random
from collections.abc import Generator, Sequence

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Done, Generated, Problem, Reply

VERSION = "1"
STOP: tuple[str, ...] = ("\n",)
MAX_NEW_TOKENS = 3
TEMPLATE = "raw"
MAX_TURNS = 20

SPAN = 63  # numbers that a hidden one may be: six halvings find it
LARGEST_FIRST = 36
NUM_HIDDEN = 3
SIZES = {"train": 4096, "test": 512}


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Return the problems of a split; needs no data. What is hidden follows from split and index."""
    if data:
        raise TaskError(f"task guess_mini hides its own numbers and takes no data; got {data!r}")
    return Generated(lambda index: _problem(split, index), SIZES[split])


def environment(problem: Problem) -> Generator[str | Reply | None, str, Done]:
    """Play one episode: a third of the reward for each number that is found."""
    answer = yield None
    for place, hidden in enumerate(problem.meta["hidden"]):
        while (guess := _number(answer)) != hidden:
            if guess is None:
                return Done(0.0)
            answer = yield "+\n" if hidden > guess else "-\n"
        if place < NUM_HIDDEN - 1:
            answer = yield Reply("=\n", 1 / NUM_HIDDEN)
    return Done(1 / NUM_HIDDEN)


def halving(first: int, hidden: int) -> list[int]:
    """Return the guesses that find a number by halving the range from `first` on."""
    low, high, guesses = first, first + SPAN - 1, [first + SPAN // 2]
    while guesses[-1] != hidden:
        low, high = (guesses[-1] + 1, high) if hidden > guesses[-1] else (low, guesses[-1] - 1)
        guesses.append((low + high) // 2)
    return guesses


def _number(answer: str) -> int | None:
    text = answer.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MAX_NEW_TOKENS else None


def _problem(split: str, index: int) -> Problem:
    rng = random.Random(f"guess_mini {VERSION} {split} {index}")
    first = rng.randint(0, LARGEST_FIRST)
    hidden = tuple(rng.randint(first, first + SPAN - 1) for _ in range(NUM_HIDDEN))
    answer = "\n".join(str(guess) for number in hidden for guess in halving(first, number))
    return Problem(f"{first}:", answer, {"first": first, "hidden": hidden, "index": index})
