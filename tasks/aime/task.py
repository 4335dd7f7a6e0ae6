"""AIME: competition problems whose answer is a whole number from 0 to 999. The texts are your own (--data)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem, datasets
from rwkv_es.task.answers import final_part, last_boxed, last_number
from rwkv_es.task.numbers import written_number

VERSION = "2"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 4096
TEMPLATE = "assistant_think"


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Read the user's texts: for `test` those of 2024 and 2025, known by the shipped keys; for `train` any others."""
    if not data:
        raise TaskError(
            "task aime ships answer keys alone, the texts may not be passed on: give --data with a folder of "
            "test.jsonl (2024 and 2025; field question) and train.jsonl (earlier years; question, answer, year)"
        )
    make = _held_out if split == "test" else _for_training
    return datasets.read_problems(data, split, {"question": str}, make, is_divided=False)


def reward(problem: Problem, text: str) -> float:
    """Score 1 when the whole number in the last box, else the last number, is the answer; else 0."""
    answer = extract(text)
    return float(answer is not None and answer == int(problem.meta["ground_truth"]))


def extract(text: str) -> int | None:
    """Return the whole number from 0 to 999 that a text answers after its thinking; None if there is none."""
    text = final_part(text)
    box = last_boxed(text)
    number = last_number(text) if box is None else written_number(box)
    return int(number) if number is not None and 0 <= number <= 999 and number == int(number) else None


def _held_out(row: Mapping[str, Any]) -> Problem:
    key = datasets.aime_keys().get(datasets.question_hash(row["question"]))
    if key is None:
        raise ValueError(
            "the question is none of AIME 2024 and 2025 (told by its words and digits, however its formulas are set); "
            "is the text complete and in English as published?"
        )
    if row.get("answer") is not None and extract(str(row["answer"])) != int(key["answer"]):
        raise ValueError(f"the answer {row['answer']!r} is not the key's for {key['id']}")
    return _problem(row["question"], key["answer"], {"id": key["id"]})


def _for_training(row: Mapping[str, Any]) -> Problem:
    years = {str(year) for year in datasets.HELD_OUT_YEARS}
    said = {str(row.get("year", "")), *re.findall(r"(?<!\d)20\d\d(?!\d)", str(row.get("id", "")))}
    if said & years:
        raise ValueError(f"year {min(said & years)} is held out for evaluation; leave it out of training data")
    if extract(str(row.get("answer", ""))) is None:
        raise ValueError(f"the answer must be a whole number from 0 to 999; got {row.get('answer')!r}")
    return _problem(row["question"], str(extract(str(row["answer"]))), {})


def _problem(question: str, answer: str, meta: Mapping[str, Any]) -> Problem:
    return Problem(question, f"\\boxed{{{answer}}}", {**meta, "ground_truth": answer})
