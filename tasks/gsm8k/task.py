"""GSM8K: grade-school word problems whose answer is one number (arXiv 2110.14168)."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rwkv_es.errors import TaskError
from rwkv_es.task import Problem, read_problems

VERSION = "1"
STOP = ("\n\nUser:",)
MAX_NEW = 1000
TEMPLATE = "think"

HUB_NAME = "openai/gsm8k"
MAX_DIGITS = 50
_DIGITS = r"([0-9][0-9,]*(?:\.[0-9]+)?|(?<![.\w])\.[0-9]+)"
_NUMBER = re.compile(_DIGITS)
_MARKED = re.compile(r"####([\s*$+−-]*)" + _DIGITS)


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Read problems from `data`, or fetch them from the Hugging Face hub (needs `datasets` and a network)."""
    if data:
        return read_problems(data, split, {"question": str, "answer": str}, _from_row)
    return [_from_row(row) for row in _fetch(split)]


def reward(problem: Problem, text: str) -> float:
    """Score 1 when the answer in the text equals the problem's as a number, else 0."""
    answer = extract(text)
    return float(answer is not None and answer == extract(problem.answer))


def extract(text: str) -> Decimal | None:
    """Return the number after the last `####` that has one, else the last number; of the text after `</think>`.

    None where there is no number, it is over 50 characters long, or the model never stopped thinking.
    """
    text = final_part(text)
    if match := _last_match(_MARKED, text):
        is_negative = "-" in match[1] or "−" in match[1]
        digits = match[2]
    elif match := _last_match(_NUMBER, text):
        is_negative = _ends_in_sign(text[max(0, match.start() - 3) : match.start()])
        digits = match[1]
    else:
        return None
    digits = digits.replace(",", "")
    if len(digits) > MAX_DIGITS:
        return None
    return -Decimal(digits) if is_negative else Decimal(digits)


def _ends_in_sign(before: str) -> bool:
    """Tell "-3", "-$3" and "= -3" from "10-3", by up to three characters before the digits."""
    before = before.removesuffix("$")
    return before.endswith(("-", "−")) and not before[-2:-1].isalnum()


def final_part(text: str) -> str:
    """Return what follows the thinking, up to the next turn or question the model may have made up itself."""
    text = text.partition("\n\nUser:")[0]
    if "<think" in text or "</think>" in text:
        text = text.rpartition("</think>")[2] if "</think>" in text else ""
    return text.partition("\n\nQuestion:")[0]


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    last = None
    for last in pattern.finditer(text):  # noqa: B007
        pass
    return last


def _from_row(row: Mapping[str, Any]) -> Problem:
    """Make a problem of a row whose answer is a number, or a solution that ends in `#### number` as on the hub."""
    answer = extract(row["answer"])
    if answer is None:
        raise ValueError(f"no number in the answer {row['answer']!r}")
    return Problem(row["question"], f"#### {answer:f}")


def _fetch(split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise TaskError(
            "task gsm8k needs its data: pass --data with a folder of train.jsonl and test.jsonl, "
            "or install the extra that fetches them: pip install rwkv-es[tasks]"
        ) from None
    try:
        return datasets.load_dataset(HUB_NAME, "main", split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{HUB_NAME} cannot be fetched ({reason}); pass --data with a local copy instead") from None
