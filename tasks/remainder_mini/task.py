"""The remainder of a division by repeated subtraction: answers of 310 to 402 tokens in which each step is easy.

A prompt such as ``861%9:`` asks what is left when 9 is taken from 861 as often as it goes. The gold answers write down
every difference, three digits each, and after the last one the remainder.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem

VERSION = "1"
STOP: tuple[str, ...] = ()
MAX_NEW_TOKENS = 416
TEMPLATE = "raw"

DIVISORS = range(5, 10)
QUOTIENTS = range(76, 100)
TEST_SHARE = 0.2
WORKED = "-"  # how an answer begins that takes the divisor itself away


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Return the problems of a split; needs no data."""
    if data:
        raise TaskError(f"task remainder_mini takes its problems from a table and no data; got {data!r}")
    return _all_problems()[split]


def reward(problem: Problem, text: str) -> float:
    """Score 1.0 if the remainder stands after the last equals sign, else 0.0."""
    _, sign, said = text.rpartition("=")
    return float(bool(sign) and said.strip() == str(problem.meta["number"] % problem.meta["divisor"]))


def worked_answer(number: int, divisor: int) -> str:
    """Write the differences down to the remainder, then the remainder."""
    return f"{WORKED}{differences(number, divisor)}"


def differences(number: int, step: int) -> str:
    """Write down what is left each time that `step` is taken away, three digits each, and what is left in the end."""
    chain = range(number, -1, -step)
    return f"{','.join(f'{each:03}' for each in chain)}={chain[-1]}"


@lru_cache(maxsize=1)
def _all_problems() -> dict[str, list[Problem]]:
    """Return both splits, each in the order of hashes."""
    divisions = [
        (divisor * quotient + remainder, divisor)
        for divisor in DIVISORS
        for quotient in QUOTIENTS
        for remainder in range(divisor)
    ]
    splits: dict[str, list[Problem]] = {"train": [], "test": []}
    for number, divisor in sorted(divisions, key=_hash):
        meta = {"number": number, "divisor": divisor}
        problem = Problem(f"{number}%{divisor}:", worked_answer(number, divisor), meta)
        splits["test" if _hash((number, divisor)) < TEST_SHARE else "train"].append(problem)
    return splits


def _hash(division: tuple[int, int]) -> float:
    """Return a number in [0, 1) that looks random and depends on the question alone."""
    return zlib.crc32(f"remainder_mini {VERSION} {division[0]} {division[1]}".encode()) / 2**32
