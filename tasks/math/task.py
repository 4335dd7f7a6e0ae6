"""Mathematics with any answer in LaTeX, compared by math-verify (pip install rwkv-es[math]). Needs --data."""

import importlib.util
import logging
import multiprocessing
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem
from rwkv_es.task.answers import final_part, last_boxed
from rwkv_es.task.datasets import read_problems

VERSION = "1"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 2048
TEMPLATE = "think"
TIMEOUT_S = 2.0  # sympy may take for ever: a worker that does is killed

MAX_CHARS = 300  # of an answer
MAX_DEPTH = 10  # of braces
_EXCESSIVE = re.compile(  # what would only be killed: caught here, where it costs nothing
    "|".join(
        (
            r"\^\s*\{[^{}]*\^\s*(?:\{[^{}]*\^|\{?\s*[0-9]{2})",  # a power of a power
            r"\^\s*\{?\s*[0-9]{4,}",
            r"\*\*[^*\s]{1,20}\*\*",
            r"!\s*!|[0-9]{4,}\s*!|binom\{?[0-9]{4,}",
        )
    )
)
_BASE = re.compile(r"[0-9]_\{?[0-9]")


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Read problems whose answers are LaTeX, without dollars."""
    if importlib.util.find_spec("math_verify") is None:
        raise TaskError("task math needs an extra: pip install rwkv-es[math]")
    if not data:
        raise TaskError("task math needs --data: a JSONL file, or a folder with one for each split; question, answer")
    return read_problems(data, split, {"question": str, "answer": str}, _from_row)


def reward(problem: Problem, text: str) -> float:
    """Score 1 when the last box after the thinking, else the last formula or number, equals the answer; else 0."""
    part = final_part(text)
    box = last_boxed(part)
    answer = part[-MAX_CHARS:] if box is None else box
    if box and _bare(box) == _bare(problem.meta["ground_truth"]):
        return 1.0
    if not answer.strip() or len(answer) > MAX_CHARS or _depth(answer) > MAX_DEPTH or _EXCESSIVE.search(answer):
        return 0.0
    return float(_is_equal(problem.meta["ground_truth"], answer if box is None else f"\\boxed{{{box}}}"))


def _is_equal(gold: str, answer: str) -> bool:
    if _BASE.search(gold) or _BASE.search(answer):  # math-verify drops the base of a number
        return False  # if they are written alike, nobody asks
    from math_verify import parse, verify

    found = [_with_imaginary_unit(value) for value in parse(answer, parsing_timeout=None)]
    return bool(verify(_parsed_gold(gold), found, timeout_seconds=None))


@lru_cache(maxsize=1024)
def _parsed_gold(gold: str) -> list[Any]:
    from math_verify import parse

    return [_with_imaginary_unit(value) for value in parse(f"${gold}$", parsing_timeout=None)]


def _with_imaginary_unit(value: Any) -> Any:
    """Read i as the imaginary unit, as in the answers of competitions."""
    from sympy import Basic, I

    letters = [symbol for symbol in value.free_symbols if symbol.name == "i"] if isinstance(value, Basic) else []
    return value.subs(letters[0], I) if letters else value


def _bare(text: str) -> str:
    return re.sub(r"[\s{}$]", "", text)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        deepest = max(deepest, depth)
    return deepest


def _from_row(row: Mapping[str, Any]) -> Problem:
    answer = row["answer"].strip().removeprefix("$").removesuffix("$")
    if not answer:
        raise ValueError("the answer is empty")
    return Problem(row["question"], f"\\boxed{{{answer}}}", {"ground_truth": answer})


if multiprocessing.parent_process() is not None and importlib.util.find_spec("math_verify") is not None:
    logging.getLogger("math_verify").disabled = True  # it warns at every call that its own timeouts are off
    _is_equal("1", "\\boxed{1}")  # a worker loads sympy before its first answer's time runs
