"""Reasoning Gym's basic_arithmetic with two numbers from 1 to 10, in signs that the embedded tiny model knows."""

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem

from ..reasoning_gym import task as reasoning_gym
from ..reasoning_gym.scorers import score

VERSION = "1"
STOP = (",",)
MAX_NEW_TOKENS = 3
TEMPLATE = "raw"
TIMEOUT_S = reasoning_gym.TIMEOUT_S

GENERATOR = "basic_arithmetic"
OPTIONS = {
    **{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+", "-", "*"]},
    **{"allow_parentheses": False, "allow_negation": False},
}
NUM_DRAWN = 3000  # so many that every question is among them
TEST_SHARE = 0.4
_EXPRESSION = re.compile(r"([1-9]|10) ([-+*]) ([1-9]|10)")


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Return every question of the split once; numbers that change places stay in theirs. Needs no data."""
    if data:
        raise TaskError(f"task arithmetic_mini draws its problems from a generator and takes no data; got {data!r}")
    return _all_problems()[split]


def reward(problem: Problem, text: str) -> float:
    """Score 1.0 if the generator's own scorer takes the whole answer for right, else 0.0."""
    return float(score(GENERATOR, text, problem.meta["item"]) == 1.0)


@lru_cache(maxsize=1)
def _all_problems() -> dict[str, list[Problem]]:
    reasoning_gym.check(GENERATOR)
    splits: dict[str, dict[str, Problem]] = {"train": {}, "test": {}}
    for item in reasoning_gym.items(GENERATOR, "train", NUM_DRAWN, OPTIONS):
        found = _EXPRESSION.fullmatch(item["metadata"]["expression"])
        if found and int(item["answer"]) >= 0:
            question = f":{''.join(found.groups())}="
            problem = Problem(question, item["answer"], {"item": item})
            splits[_split(int(found[1]), found[2], int(found[3]))].setdefault(question, problem)
    return {split: list(found.values()) for split, found in splits.items()}


def _split(x: int, sign: str, y: int) -> str:
    key = f"arithmetic_mini {min(x, y)} {sign} {max(x, y)}"
    return "test" if zlib.crc32(key.encode()) % 1000 < 1000 * TEST_SHARE else "train"
