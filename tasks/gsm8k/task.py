"""GSM8K: grade-school word problems whose answer is one number (arXiv 2110.14168)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_es.task import Problem
from rwkv_es.task.answers import answered_number, final_part
from rwkv_es.task.datasets import fetch_rows, read_problems
from rwkv_es.task.numbers import Number, as_text

VERSION = "2"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 1000
TEMPLATE = "think"

HUB_NAME = "openai/gsm8k"


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Read problems from `data`, or fetch them from the Hugging Face hub (needs `datasets` and a network)."""
    if data:
        return read_problems(data, split, {"question": str, "answer": str}, _from_row)
    return [_from_row(row) for _, row in fetch_rows(HUB_NAME, "main", split)]


def reward(problem: Problem, text: str) -> float:
    """Score 1 when the answer in the text equals the problem's as a number, else 0."""
    answer = extract(text)
    return float(answer is not None and answer == extract(problem.answer))


def extract(text: str) -> Number | None:
    """Return the number that a text answers after its thinking; None if there is none."""
    return answered_number(final_part(text))


def _from_row(row: Mapping[str, Any]) -> Problem:
    """Make a problem of a row whose answer is a number, or a solution that ends in `#### number` as on the hub."""
    answer = extract(row["answer"])
    if answer is None:
        raise ValueError(f"no number in the answer {row['answer']!r}")
    return Problem(row["question"], f"#### {as_text(answer)}", {"ground_truth": as_text(answer)})
