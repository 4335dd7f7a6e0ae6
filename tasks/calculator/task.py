"""Arithmetic with a calculator: <calc>12 * 34</calc> is answered by the environment, <answer> ends the episode."""

import random
from collections.abc import Sequence
from fractions import Fraction

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Generated, Problem
from rwkv_es.task.answers import last_tagged
from rwkv_es.task.tools import tool_loop

from ..countdown.task import value_of

VERSION = "1"
STOP = ("\n\nUser:",)
STOP_INCLUDED = ("</calc>", "</answer>")
MAX_NEW_TOKENS = 200
TEMPLATE = "chat"
MAX_TURNS = 10

SIZES = {"train": 10_000, "test": 500}
HOW = (
    "Write <calc>12 * 34</calc> to use a calculator for one operation with two numbers; it replies with the result. "
    "Give the final number in <answer> </answer> tags."
)


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Draw chains of operations; needs no data."""
    if data:
        raise TaskError(f"task calculator draws its own problems and takes no data; got {data!r}")
    return Generated(lambda index: _problem(split, index), SIZES[split])


def calc(text: str) -> Fraction:
    """Compute one operation with two numbers.

    Raises:
        ValueError: it is something else.
    """
    return value_of(text, most_numbers=2, most_digits=20)


def reward(problem: Problem, text: str) -> float:
    """Score the number in the last answer tag."""
    found = (last_tagged(text) or "").strip().replace(",", "")
    return float(found == problem.meta["value"])


environment = tool_loop({"calc": calc}, reward)


def _problem(split: str, index: int) -> Problem:
    rng = random.Random(f"calculator {VERSION} {split} {index}")
    value, calls = rng.randint(100, 9999), []
    expression = str(value)
    for _ in range(rng.randint(2, 4)):
        operator, number = rng.choice("+-*"), rng.randint(11, 999)
        calls.append(f"<calc>{value} {operator} {number}</calc>")
        expression = f"({expression} {operator} {number})"
        value = {"+": value + number, "-": value - number, "*": value * number}[operator]
    answer = "\n".join([*calls, f"<answer>{value}</answer>"])
    return Problem(f"What is {expression[1:-1]}? {HOW}", answer, {"value": str(value)})
