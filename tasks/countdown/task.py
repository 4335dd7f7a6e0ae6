"""Countdown: reach a target with every given number used exactly once, by + - * / and parentheses."""

import random
import re
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Generated, Problem
from rwkv_es.task.answers import last_tagged as last_answer
from rwkv_es.task.datasets import read_problems

VERSION = "2"
STOP = ("\n\nUser:",)
STOP_INCLUDED = ("</answer>",)
MAX_NEW_TOKENS = 1000
TEMPLATE = "assistant_think"

SIZES = "2345678"
NUM_GENERATED = {"train": 100_000, "test": 1_000}
MAX_CHARS = 200
MAX_DEPTH = 20
FORMAT = "Return the final expression in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
FIELDS = {"question": str, "answer": str, "numbers": list, "target": int}
_ALLOWED = re.compile(r"[0-9+\-*/() \t\r\n]*")
_TOKEN = re.compile(r"[0-9]+|[^0-9\s]")


def problems(split: str, data: str = "", argument: str = "") -> Sequence[Problem]:
    """Read problems from `data`, or generate them: item i depends on (split, i) and the argument alone.

    The argument is how many numbers a problem has: 5, or 4-6.
    """
    if data and argument:
        raise TaskError(f"countdown:{argument} generates its problems; leave out the number or the data {data}")
    if data:
        return read_problems(data, split, FIELDS, _from_row)
    sizes = _sizes(argument)
    key = f"countdown:{argument}" if argument else "countdown"
    return Generated(lambda index: _generate(f"{key}/{split}/{index}", split, sizes), NUM_GENERATED[split])


def reward(problem: Problem, text: str) -> float:
    """Score the last answer tag: 1 for a solution, 0.1 for any other answer in tags, 0 without one."""
    expression = last_answer(text)
    if expression is None:
        return 0.0
    return 1.0 if is_solution(expression, problem.meta["numbers"], problem.meta["target"]) else 0.1


def is_solution(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Say whether the expression is well formed, uses every number exactly once and equals the target exactly.

    At most 200 characters: ASCII digits, + - * / ( ) and white space; signs and parentheses nest at most 20 deep.
    """
    expression = expression.strip()
    if len(expression) > MAX_CHARS or not _ALLOWED.fullmatch(expression):
        return False
    tokens = _TOKEN.findall(expression)
    if sorted(filter(str.isdigit, tokens)) != sorted(map(str, numbers)):
        return False  # before any arithmetic: this bounds every intermediate value
    rest = ["", *reversed(tokens)]  # read from its end; "" says that nothing is left
    try:
        return _sum(rest, 0) == target and rest == [""]
    except (ValueError, ZeroDivisionError):
        return False


def value_of(expression: str, most_numbers: int, most_digits: int) -> Fraction:
    """Compute an expression of so many numbers at most, within the bounds of `is_solution`.

    Raises:
        ValueError, ZeroDivisionError: it is not well formed, or divides by zero.
    """
    tokens = _TOKEN.findall(expression.strip())
    numbers = [token for token in tokens if token.isdigit()]
    if len(expression) > MAX_CHARS or not _ALLOWED.fullmatch(expression):
        raise ValueError("only numbers, + - * / and parentheses are understood")
    if len(numbers) > most_numbers or max(map(len, numbers), default=0) > most_digits:
        raise ValueError(f"at most {most_numbers} numbers of at most {most_digits} digits are understood")
    rest = ["", *reversed(tokens)]
    value = _sum(rest, 0)
    if rest != [""]:
        raise ValueError("this is no expression")
    return value


def _sum(rest: list[str], depth: int) -> Fraction:
    """Take `product (+|- product)*` off the end of the reversed tokens."""
    value = _product(rest, depth)
    while rest[-1] in ("+", "-"):
        sign = 1 if rest.pop() == "+" else -1
        value += sign * _product(rest, depth)
    return value


def _product(rest: list[str], depth: int) -> Fraction:
    """Take `factor (*|/ factor)*` off the end of the reversed tokens."""
    value = _factor(rest, depth)
    while rest[-1] in ("*", "/"):
        if rest.pop() == "*":
            value *= _factor(rest, depth)
        else:
            value /= _factor(rest, depth)
    return value


def _factor(rest: list[str], depth: int) -> Fraction:
    """Take a number, a factor with a sign, or a sum in parentheses off the end of the reversed tokens."""
    token = rest.pop() if len(rest) > 1 else ""
    if token.isdigit():
        return Fraction(int(token))
    if depth == MAX_DEPTH or token not in ("+", "-", "("):
        raise ValueError(f"no number at {token!r}")
    if token == "(":
        value = _sum(rest, depth + 1)
        if rest.pop() != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    value = _factor(rest, depth + 1)
    return -value if token == "-" else value


def _problem(question: str, expression: str, numbers: Sequence[int], target: int) -> Problem:
    meta = {"numbers": tuple(numbers), "target": target}
    return Problem(f"{question} {FORMAT}", f"<answer>{expression}</answer>", meta)


def _from_row(row: Mapping[str, Any]) -> Problem:
    if not is_solution(row["answer"], row["numbers"], row["target"]):
        raise ValueError(f"the answer {row['answer']!r} does not solve {row['numbers']} = {row['target']}")
    return _problem(row["question"], row["answer"], row["numbers"], row["target"])


def _sizes(argument: str) -> Sequence[int]:
    first, _, last = argument.partition("-")
    if not argument:
        return (3, 4)
    if not (first in SIZES and (last or first) in SIZES and int(first) <= int(last or first)):
        raise TaskError(f"countdown:N takes 2 to 8 numbers, as in countdown:5 or countdown:4-6; got {argument!r}")
    return range(int(first), int(last or first) + 1)


def _generate(key: str, split: str, sizes: Sequence[int]) -> Problem:
    """Draw numbers and a way to combine them until the target fits and the problem belongs to the split."""
    rng = random.Random(key)
    while True:
        numbers = [rng.randint(1, 99) for _ in range(rng.choice(sizes))]
        value, expression = _combine(numbers, rng)
        if value.denominator == 1 and 10 <= value <= 100 and split_of(numbers, int(value)) == split:
            question = (
                f"Reach the target {value} with the numbers {numbers}. "
                "Use every number exactly once, and only +, -, *, / and parentheses."
            )
            return _problem(question, expression, numbers, int(value))


def split_of(numbers: Sequence[int], target: int) -> str:
    """Return the split of a problem: a function of the problem, so that the splits share none."""
    return "train" if zlib.crc32(f"{sorted(numbers)} {target}".encode()) % 2 else "test"


def _combine(numbers: Sequence[int], rng: random.Random) -> tuple[Fraction, str]:
    """Join random pairs by random operators until one value and its expression are left."""
    terms = [(Fraction(number), str(number)) for number in numbers]
    while len(terms) > 1:
        a, left = terms.pop(rng.randrange(len(terms)))
        b, right = terms.pop(rng.randrange(len(terms)))
        operator = rng.choice("+-*/" if b else "+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b
        terms.append((value, f"({left} {operator} {right})"))
    value, expression = terms[0]
    return value, expression[1:-1]
