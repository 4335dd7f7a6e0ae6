"""Reasoning Gym, asked again after a wrong answer: reasoning_again:NAME, as reasoning_gym:NAME."""

from collections.abc import Generator, Sequence

from rwkv_es.task import Done, Problem

from ..reasoning_gym import task as once

VERSION = once.VERSION
STOP = once.STOP
STOP_INCLUDED = ("</answer>",)
MAX_NEW_TOKENS = once.MAX_NEW_TOKENS
TEMPLATE = once.TEMPLATE
TIMEOUT_S = once.TIMEOUT_S
MAX_TURNS = 4

AGAIN = 0.5  # what a right answer earns at the second attempt, and so on: half of what it would have before


def problems(split: str, data: str = "", argument: str = "") -> Sequence[Problem]:
    """Return the items of reasoning_gym:NAME, in its way."""
    return once.problems(split, data, argument)


def environment(problem: Problem) -> Generator[str | None, str, Done]:
    """Score each answer by the generator's own rules."""
    answer, worth = (yield None), 1.0
    while (score := once.reward(problem, answer)) < 1.0:
        worth *= AGAIN
        answer = yield "That is wrong. Try again." if score == 0.0 else "That is not quite right. Try again."
    return Done(worth)
