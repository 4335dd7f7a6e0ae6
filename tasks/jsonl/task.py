"""JSONL: any file of questions and answers (JSONL, CSV, parquet, hf:owner/name), with exact match or your reward."""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from rwkv_es.system.errors import TaskError
from rwkv_es.task import SYSTEM, Problem
from rwkv_es.task.answers import answered_number, final_part, last_number
from rwkv_es.task.datasets import QUESTION_FIELDS, problems_of
from rwkv_es.task.numbers import as_text

VERSION = "3"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 500
TEMPLATE = "chat"

MESSAGES = "messages"  # a column with a conversation of one question, and perhaps its answer
_NUMBER = re.compile(r"\s*[-+−]?\$?[0-9][0-9,]*(?:\.[0-9]+)?\s*")


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Read every row of the split; its columns are the problem's meta, for rewards that want them.

    Of data without splits a hash of the question holds out a tenth.
    """
    if not data:
        raise TaskError(
            "task jsonl needs --data: a JSONL, CSV or parquet file, a folder of them, or hf:owner/name of the hub"
        )
    return problems_of(data, split, _from_row)


def reward(problem: Problem, text: str) -> float:
    """Score 1 when what follows the thinking, or its last line, is the answer, or its last number if that is one."""
    if not problem.answer:
        raise ValueError("the row has no answer to compare with; name a reward of yours by --reward file.py:function")
    text = final_part(text).strip()
    return float(any(_is_answer(text, right) for right in (problem.answer, *(_rights(problem.meta) or ()))))


def _is_answer(text: str, right: str) -> bool:
    right = right.strip()
    if right in (text, text.rpartition("\n")[2].strip()):
        return True
    return bool(_NUMBER.fullmatch(right)) and answered_number(text) == last_number(right)


def _from_row(where: str, row: Mapping[str, Any]) -> Problem:
    fields = (*QUESTION_FIELDS, MESSAGES)
    name = next((name for name in fields if row.get(name) is not None), None)
    if name is None:
        raise TaskError(f"{where} has no question; it needs one of the fields {', '.join(fields)}")
    question, meta = row[name], dict(row)
    fail = partial(_fail, f"{where}: field {name!r}")
    if isinstance(question, str):
        meta.pop("prompt", None)
        return Problem(question, _answer_of(where, row), meta)
    turns = _turns(question) or fail(f"must be a text or a list of messages; got {question!r:.80}")
    if name == MESSAGES and len(turns) > 1 and turns[-1][0] == "assistant":
        turns.pop()  # the answer, see `_rights`
    if turns[0][0] == "system":
        meta[SYSTEM] = turns.pop(0)[1]
    if [role for role, _ in turns] != ["user"]:
        fail("must be one message of the user, with or without a system text before it")
    return Problem(turns[0][1], _answer_of(where, row), meta)


def _answer_of(where: str, row: Mapping[str, Any]) -> str:
    """Return the answer as a text, of several right ones the first; "" if the row has none that this task can read.

    Raises:
        TaskError: the column answer holds something else.
    """
    rights = _rights(row)
    if rights is None and row.get("answer") is not None:
        raise TaskError(
            f"{where}: field 'answer' must be a text, a number, or a list of those that are right; got "
            f"{row['answer']!r:.80}; what only a reward of yours reads may stand in a column of another name"
        )
    return rights[0] if rights else ""


def _rights(row: Mapping[Any, Any]) -> list[str] | None:
    """Return the right answers of a row: of its first column for them that is not null. None: they cannot be read."""
    verl = row.get("reward_model")
    found = [
        row.get("answer"),
        row.get("ground_truth"),
        verl.get("ground_truth") if isinstance(verl, Mapping) else None,
        _said(row.get("completion")),
        _said(row.get(MESSAGES)),
    ]
    value = next((value for value in found if value is not None), "")
    values = [value] if not isinstance(value, (list, tuple)) else [right for right in value if right is not None]
    texts = [text for text in map(_written, values) if text is not None]
    return [text for text in texts if text] if len(texts) == len(values) > 0 else None


def _said(value: Any) -> str | None:
    """Return a text, or what the assistant says in the last one of some messages; None if it is neither."""
    if isinstance(value, str):
        return value
    turns = _turns(value)
    return turns[-1][1] if turns and turns[-1][0] == "assistant" else None


def _written(value: Any) -> str | None:
    """Write an answer as a person does; None if it is neither a text nor a finite number."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    if not isinstance(value, int) and not math.isfinite(value):
        return None
    return f"{value:f}" if isinstance(value, Decimal) else as_text(Decimal(repr(value)))


def _turns(value: Any) -> list[tuple[str, str]]:
    """Return (role, content) of a list of messages; [] if it is none."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        return []
    turns = [(message.get("role"), message.get("content")) for message in value]
    return turns if all(isinstance(part, str) for turn in turns for part in turn) else []


def _fail(where: str, reason: str) -> Any:
    raise TaskError(f"{where} {reason}")
