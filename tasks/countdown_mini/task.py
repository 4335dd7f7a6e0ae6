"""Countdown with three numbers from 1 to 10: the task that the embedded tiny model was pretrained for.

A prompt such as ``3 7 10=24:`` asks for an expression of all three numbers, each used once, that equals 24. The gold
answers write down a systematic search, line by line, and then the expression between ``<answer>`` and ``</answer>``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations_with_replacement, permutations
from typing import NamedTuple

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Generated, Problem

from ..countdown.task import is_solution, last_answer

VERSION = "1"
STOP: tuple[str, ...] = ()
MAX_NEW_TOKENS = 176
TEMPLATE = "raw"

LARGEST_NUMBER = 10
LARGEST_TARGET = 100
TEST_SHARE = 0.2


class Line(NamedTuple):
    """One line of the search: two numbers combined, and what each operation with the third number makes of it."""

    expression: str
    value: int
    third: int
    results: tuple[tuple[str, int], ...]


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Return every solvable problem of the split, in the order of their hashes; needs no data.

    The same numbers and target in another order belong to the same split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"countdown_mini has the splits train and test; got {split!r}")
    if data:
        raise TaskError(f"task countdown_mini takes its problems from a table and no data; got {data!r}")
    questions = _questions()[split]
    return Generated(lambda index: _problem(*questions[index]), len(questions))


def reward(problem: Problem, text: str) -> float:
    """Score 1.0 if the last <answer>…</answer> of the text solves the problem, else 0.0."""
    expression = last_answer(text)
    if expression is None:
        return 0.0
    return float(is_solution(expression, problem.meta["numbers"], problem.meta["target"]))


@lru_cache(maxsize=1)
def _questions() -> dict[str, list[tuple[tuple[int, ...], int]]]:
    """Return (numbers, target) of every problem of each split."""
    splits: dict[str, list[tuple[tuple[int, ...], int]]] = {"train": [], "test": []}
    for numbers in combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3):
        for target in {result for line in search(numbers) for _, result in line.results}:
            split = "test" if _hash(numbers, target) < TEST_SHARE else "train"
            splits[split] += [(order, target) for order in set(permutations(numbers))]
    return {split: sorted(found, key=lambda question: _hash(*question)) for split, found in splits.items()}


def _problem(numbers: Sequence[int], target: int) -> Problem:
    prompt = f"{numbers[0]} {numbers[1]} {numbers[2]}={target}:"
    return Problem(prompt, worked_answer(numbers, target), {"numbers": tuple(numbers), "target": target})


def _hash(numbers: Sequence[int], target: int) -> float:
    """Return a number in [0, 1) that looks random and depends on the question alone."""
    digest = hashlib.sha256(f"countdown_mini {VERSION} {tuple(numbers)} {target}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def worked_answer(numbers: Sequence[int], target: int) -> str:
    """Write the search up to the first hit, then the answer; "" if no expression reaches the target."""
    return answer_after(list(search(numbers)), target)


def answer_after(lines: Sequence[Line], target: int) -> str:
    """Write the lines up to the first result that equals the target, then the answer; "" if none does."""
    text = ""
    for line in lines:
        text += f"\n{line.expression}={line.value},"
        for operator, result in line.results:
            text += f"{operator}{result}"
            if result == target:
                return f"{text}<answer>{_complete(line, operator)}</answer>"
    return ""


def search(numbers: Sequence[int]) -> Iterator[Line]:
    """Yield a line per pair of the numbers and operation, in a fixed order; complete for targets of 1 and more."""
    first, second, last = numbers
    pairs = {}  # each pair once, even if two numbers are equal
    for x, y, third in ((first, second, last), (first, last, second), (second, last, first)):
        pairs.setdefault((x, y), third)
    for (x, y), third in pairs.items():
        for operator, value in _combine(x, y):
            results = tuple((op, result) for op, result in _combine(value, third) if result <= LARGEST_TARGET)
            yield Line(_ordered(str(x), operator, str(y), x >= y), value, third, results)


def _combine(x: int, y: int) -> Iterator[tuple[str, int]]:
    """Yield the sum, the positive difference, the product and the whole quotient of two numbers."""
    high, low = max(x, y), min(x, y)
    yield "+", high + low
    if high > low:
        yield "-", high - low
    yield "*", high * low
    if low > 1 and high % low == 0:
        yield "/", high // low


def _complete(line: Line, operator: str) -> str:
    return _ordered(f"({line.expression})", operator, str(line.third), line.value >= line.third)


def _ordered(left: str, operator: str, right: str, left_is_larger: bool) -> str:
    """Join in the order that keeps a difference positive and a quotient at least one."""
    return f"{left}{operator}{right}" if left_is_larger or operator in "+*" else f"{right}{operator}{left}"
