"""GSM8K scored as lm-evaluation-harness does (its gsm8k.yaml, version 3): strict-match and flexible-extract."""

import re

INVALID = "[invalid]"  # what the harness takes for the answer if there is none
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_FULL_STOP = re.compile(r"\.$")


def strict_match(text: str) -> str:
    """Return the number after the first `#### `."""
    found = _STRICT.search(text)
    return found[1].strip() if found else INVALID


def flexible_extract(text: str) -> str:
    """Return the last thing that looks like a number."""
    found = _FLEXIBLE.findall(text)
    return next(group for group in found[-1] if group).strip() if found else INVALID


RULES = {"strict-match": strict_match, "flexible-extract": flexible_extract}


def exact_match(extracted: str, gold: str) -> bool:
    """Compare an extracted answer with the gold solution, or its `#### number`, as the harness's exact_match does."""
    return _normal(extracted) == _normal(gold)


def scores(text: str, gold: str) -> dict[str, float]:
    """Score a text by both rules, under the harness's names."""
    return {f"exact_match,{name}": float(exact_match(rule(text), gold)) for name, rule in RULES.items()}


def _normal(text: str) -> str:
    """Drop what the harness's regexes_to_ignore match: ",", "$", all up to the last "#### ", a full stop at the end.

    In one pass: its third pattern, `(?s).*#### `, takes quadratic time if there is no such mark.
    """
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return _FULL_STOP.sub("", text).lower()
