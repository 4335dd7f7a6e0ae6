"""SVAMP: elementary word problems with a change of wording; every answer is one number (arXiv 2103.07191)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_es.task import Problem
from rwkv_es.task.answers import last_number
from rwkv_es.task.datasets import fetch_rows, read_problems

from ..gsm8k import task as gsm8k

VERSION = "2"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 500
TEMPLATE = "think"

HUB_NAME = "ChilleD/SVAMP"
reward = gsm8k.reward  # both have one number for an answer


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Read problems from `data`, or fetch them from the Hugging Face hub (needs `datasets` and a network)."""
    if data:
        return read_problems(data, split, {"question": str, "answer": str}, _from_row)
    return [_from_hub(row) for _, row in fetch_rows(HUB_NAME, "", split)]


def _from_row(row: Mapping[str, Any]) -> Problem:
    answer = last_number(row["answer"])
    if answer is None:
        raise ValueError(f"no number in the answer {row['answer']!r}")
    return Problem(row["question"], f"#### {answer:f}", {"ground_truth": f"{answer:f}"})


def _from_hub(row: Mapping[str, Any]) -> Problem:
    """Join what the hub keeps apart: the story and its question."""
    story = row["Body"].strip()
    return _from_row({"question": f"{story}{'' if story[-1:] in '.?!,' else '.'} {row['Question']}", **_answer(row)})


def _answer(row: Mapping[str, Any]) -> dict[str, str]:
    return {"answer": str(row["Answer"])}
