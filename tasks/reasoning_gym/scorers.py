"""How an answer to an item of Reasoning Gym is scored, without ever running what a model wrote."""

import copy
import inspect
import json
import math
import re
import sys
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rwkv_es.task.numbers import written_number

from ..countdown.task import is_solution

# Their modules evaluate something, but never the answer: looked through at version 0.1.25.
REVIEWED = ("basic_arithmetic", "bitwise_arithmetic", "number_sorting", "propositional_logic", "polynomial_equations")
LENIENT = ("game_of_life_halting",)  # takes any text for "False"
_SMALL = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?e-[0-9]{1,2}")
_NEAR = Fraction(1, 10_000)
_NOT_FINITE = re.compile(r"(?<![^\W\d_])(?:nan|inf|infinity)[ij]?(?![^\W\d_])", re.IGNORECASE)
_POWER = re.compile(r"[0-9]{1,400}(?:\.[0-9]{0,400})?[eE]\+?[0-9]{1,400}|[0-9]{309,400}")
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify|parse_latex)\s*\(")


def score(name: str, answer: str, item: Mapping[str, Any]) -> float:
    """Return the generator's own score; for those whose scorers execute answers, whether it is right by our rules."""
    metadata = item["metadata"]
    if not answer.strip() or (_is_not_finite(answer) and not _is_not_finite(str(item["answer"]))):
        return 0.0
    if name == "countdown":
        return float(is_solution(answer, metadata["numbers"], metadata["target"]))
    if name == "puzzle24":
        return float(is_solution(answer, metadata["numbers"], 24))
    if name == "coin_flip":  # its own pays a common beginning: "0" is worth 1
        return float(_is_near(answer, str(item["answer"])))
    if name in LENIENT or executes(name):
        return float("".join(answer.split()) == "".join(str(item["answer"]).split()))
    found = answer if answer == item["answer"] else answer.strip()
    try:
        paid = float(_scorer(name)(found, copy.deepcopy(item)))  # some write into what they are given
        return paid if 0.0 <= paid <= 1.0 else 0.0
    except Exception:  # noqa: BLE001  some raise whatever comes to their mind at an answer of an unexpected form
        return 0.0


def _is_near(answer: str, gold: str) -> bool:
    """Compare probabilities, as decimals or fractions, by four digits."""
    text, right = answer.strip(), Fraction(gold)
    found = Fraction(text) if _SMALL.fullmatch(text) else written_number(text)
    return found is not None and abs(Fraction(found) - right) <= _NEAR * right


def _is_not_finite(text: str) -> bool:
    """Tell a text with NaN or infinity in it, or a number beyond all floats: comparisons with them may say anything."""
    return bool(_NOT_FINITE.search(text)) or any(math.isinf(float(found[0])) for found in _POWER.finditer(text))


def gold_of(item: Mapping[str, Any]) -> str:
    """Return a right answer; "" if the generator does not know one (boxnet, rush_hour)."""
    metadata = item["metadata"]
    if item["answer"] is not None:
        return str(item["answer"])
    if "possible_answer" in metadata:
        return json.dumps(metadata["possible_answer"])
    return str(metadata.get("example_answer") or metadata.get("example_correct_answer") or "")


@lru_cache
def executes(name: str) -> bool:
    """Say whether a generator's scorer may evaluate the answer as code: its module does such a thing."""
    from reasoning_gym.factory import DATASETS

    if name in REVIEWED:
        return False
    classes = [kind for kind in DATASETS[name][0].__mro__ if kind.__module__.startswith("reasoning_gym.")]
    modules = {kind.__module__ for kind in classes}
    return any(_EVALUATES.search(inspect.getsource(sys.modules[module])) for module in modules)


@lru_cache(maxsize=8)
def _scorer(name: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0).score_answer
