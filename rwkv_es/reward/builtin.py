"""Ready-made rewards beside a task's own: the form of an answer, and its length."""

from collections.abc import Callable

from rwkv_es.system.errors import RewardError
from rwkv_es.task.task import Problem

USUAL_CHARS = 4000

Reward = Callable[[Problem, str], float]


def make_format(argument: str) -> Reward:
    """Return a reward of 1 for an answer in the form that is expected, else 0."""
    if argument:
        raise RewardError(f"builtin:format takes nothing after it; got {argument!r}")
    return has_form


def has_form(problem: Problem, text: str) -> float:
    """Score 1 if thinking, once begun, ends once and something follows; in one answer tag if the gold has one."""
    rest = text
    if "<think" in text or "</think>" in text:
        thought, _, rest = text.partition("</think>")
        if not thought.lstrip().startswith("<think") or thought.count("<think") > 1 or "</think>" in rest:
            return 0.0
    if "<answer>" in problem.answer:
        start, end = rest.find("<answer>"), rest.find("</answer>")
        is_once = rest.count("<answer>") == rest.count("</answer>") == 1
        return float(is_once and start < end and bool(rest[start + len("<answer>") : end].strip()))
    return float(bool(rest.strip()))


def make_length(argument: str) -> Reward:
    """Return a penalty that falls with the characters of an answer, from 0 to -1 at `argument` of them and more."""
    if argument and not (argument.isascii() and argument.isdigit() and int(argument)):
        raise RewardError(f"builtin:length:N takes a number of characters above 0; got {argument!r}")
    most = int(argument or USUAL_CHARS)
    return lambda problem, text: -min(len(text), most) / most


MAKERS: dict[str, Callable[[str], Reward]] = {"format": make_format, "length": make_length}
