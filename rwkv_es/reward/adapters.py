"""Reward functions as TRL, verl and plain Python write them, called as they are; and several of them with weights."""

import asyncio
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from rwkv_es.errors import RewardError
from rwkv_es.reward import builtin
from rwkv_es.task.task import PART, SYSTEM, Problem, Task, import_file

SIGNATURES = ("auto", "task", "plain", "trl", "trl_messages", "verl")
OUR_COLUMNS = (
    "prompt",
    "prompts",
    "completion",
    "completions",
    PART,
    SYSTEM,
)  # of a problem's meta: never passed as columns


class Answer(NamedTuple):
    """What is scored. `text` is opening + completion."""

    problem: Problem
    text: str
    token_ids: Sequence[int] | None = None  # of the completion alone; None: nobody gave them
    step: int = 0


class Outcome(NamedTuple):
    """A reward (None: not applicable), and numbers for the metrics."""

    value: Any
    logs: dict[str, float]


Scorer = Callable[[Answer], Outcome]


class Weighted(NamedTuple):
    """One reward of the options: `file.py:fn=0.7`."""

    reference: str
    weight: float


def load_scorer(task: Task, rewards: str, signature: str = "auto") -> Scorer:
    """Return what scores an answer: the task's own reward, or the weighted sum of those that the options name.

    A reward that is not applicable (None) is left out of the sum; where all are, the sum is.

    Raises:
        RewardError: a function cannot be loaded, or its form is not known.
    """
    if not rewards:
        return lambda answer: Outcome(task.reward(answer.problem, answer.text), {})
    weighted = parse_rewards(rewards)
    scorers = [_load(part.reference, task, signature) for part in weighted]
    names = _short_names([part.reference for part in weighted])

    def score(answer: Answer) -> Outcome:
        outcomes = [scorer(answer) for scorer in scorers]
        values = {name: outcome.value for name, outcome in zip(names, outcomes) if outcome.value is not None}
        logs = {f"log/{key}": value for outcome in outcomes for key, value in outcome.logs.items()}
        logs.update({f"reward/{name}": float(value) for name, value in values.items()})
        terms = [part.weight * values[name] for part, name in zip(weighted, names) if name in values]
        return Outcome(sum(terms) if terms else None, logs)

    return score


def parse_rewards(spec: str) -> list[Weighted]:
    """Read `file.py:fn=0.7,pkg.mod:fn2=0.3`; a weight left out is 1.

    Raises:
        RewardError: a weight is no number, or a name is missing.
    """
    return [_weighted(part.strip()) for part in spec.split(",")]


def load_function(reference: str) -> Callable[..., Any]:
    """Load `file.py:fn`, `pkg.mod:fn`, `pkg.mod.fn`, or `builtin:name`.

    Raises:
        RewardError: there is no such thing.
    """
    if reference.startswith("builtin:"):
        return _built_in(reference)
    where, _, name = reference.rpartition(":" if ":" in reference else ".")
    if reference.endswith(".py") or not (where and name):
        raise RewardError(
            f"the reward {reference!r} names no function; write file.py:function or package.module:function"
        )
    function = getattr(_import(where, reference), name, None)
    if not callable(function):
        raise RewardError(f"the reward {reference!r}: {where} has no function {name!r}")
    return function


def form_of(function: Callable[..., Any], reference: str) -> str:
    """Tell a function's form by the names of its parameters.

    Raises:
        RewardError: it has none of the known ones.
    """
    parameters = inspect.signature(function).parameters
    required = [p for p in parameters.values() if p.default is p.empty and p.kind in (0, 1)]
    if "solution_str" in parameters:
        return "verl"
    if parameters.keys() & {"completions", "completion_ids", "prompts"}:
        return "trl"
    if [p.name for p in required] == ["problem", "text"]:
        return "task"
    if 1 <= len(required) <= 2:
        return "plain"
    raise RewardError(
        f"the reward {reference!r} takes ({', '.join(parameters)}); known forms: f(completions, **columns) of TRL, "
        "compute_score(solution_str, ground_truth) of verl, f(completion, answer); or say which by --reward-signature"
    )


def gold_of(problem: Problem) -> Any:
    """Return what a foreign reward compares with: the row's own answer, unchanged where there is one."""
    verl = problem.meta.get("reward_model")
    for found in (problem.meta, verl if isinstance(verl, Mapping) else {}):
        if found.get("ground_truth") is not None:
            return found["ground_truth"]
    return problem.meta.get("answer", problem.answer)


def _load(reference: str, task: Task, signature: str) -> Scorer:
    if reference == "builtin:task":
        return lambda answer: Outcome(task.reward(answer.problem, answer.text), {})
    function = load_function(reference)
    form = form_of(function, reference) if signature == "auto" or reference.startswith("builtin:") else signature
    call = partial(_CALLS[form], function, inspect.signature(function).parameters)
    if form == "verl":
        return lambda answer: call(answer, task.part_of(answer.problem).name)
    return call


def _call_task(function: Callable[..., Any], _: Any, answer: Answer) -> Outcome:
    return Outcome(_awaited(function(answer.problem, answer.text)), {})


def _call_plain(function: Callable[..., Any], parameters: Mapping[str, Any], answer: Answer) -> Outcome:
    arguments = (answer.text.lstrip(" "), gold_of(answer.problem))
    takes_all = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return Outcome(_awaited(function(*arguments[: 2 if takes_all else 1])), {})


def _call_verl(function: Callable[..., Any], parameters: Mapping[str, Any], answer: Answer, name: str) -> Outcome:
    meta = answer.problem.meta
    given = {
        "data_source": meta.get("data_source", name),
        "solution_str": answer.text.lstrip(" "),
        "ground_truth": gold_of(answer.problem),
        "extra_info": meta.get("extra_info", {key: value for key, value in meta.items() if key not in OUR_COLUMNS}),
    }
    found = _awaited(function(**_wanted(given, parameters)))
    if not isinstance(found, Mapping):
        return Outcome(found, {})
    if "score" not in found:
        raise ValueError(f"a reward of verl's form that returns a dict needs the key 'score'; got {sorted(found)}")
    logs = {key: float(value) for key, value in found.items() if key != "score" and _is_number(value)}
    return Outcome(found["score"], logs)


def _call_trl(function: Callable[..., Any], parameters: Mapping[str, Any], answer: Answer) -> Outcome:
    is_messages = isinstance(answer.problem.meta.get("prompt"), (list, tuple))
    return _call_trl_with(is_messages, function, parameters, answer)


def _call_trl_with(
    is_messages: bool, function: Callable[..., Any], parameters: Mapping[str, Any], answer: Answer
) -> Outcome:
    """Call for one completion at a time, so that a time limit costs one answer: every list has one entry."""
    prompt, text = answer.problem.prompt, answer.text.lstrip(" ")
    own = answer.problem.meta.get("prompt")
    messages = own if isinstance(own, (list, tuple)) else [{"role": "user", "content": prompt}]
    logs: dict[str, float] = {}
    given: dict[str, Any] = {name: [value] for name, value in _columns(answer.problem).items()}
    given.update(
        prompts=[messages if is_messages else prompt],
        completions=[[{"role": "assistant", "content": text}] if is_messages else text],
        trainer_state=SimpleNamespace(global_step=answer.step),
        log_extra=lambda name, values: logs.update(_first_number(name, values)),
        log_metric=lambda name, value: logs.update(_first_number(name, [value])),
    )
    if answer.token_ids is not None:
        given["completion_ids"] = [list(answer.token_ids)]
    elif "completion_ids" in parameters:
        raise ValueError("this reward reads completion_ids, but no token ids are known where it was called")
    values = _awaited(function(**_wanted(given, parameters)))
    if not isinstance(values, Sequence) or len(values) != 1:
        raise ValueError(f"a reward of TRL's form must return a list with one value per completion (1); got {values!r}")
    return Outcome(values[0], logs)


_CALLS: dict[str, Callable[..., Outcome]] = {
    "task": _call_task,
    "plain": _call_plain,
    "trl": _call_trl,
    "trl_messages": partial(_call_trl_with, True),
    "verl": _call_verl,
}


def _columns(problem: Problem) -> dict[str, Any]:
    columns = {"answer": problem.answer, **problem.meta}
    return {name: value for name, value in columns.items() if name not in OUR_COLUMNS}


def _wanted(given: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


def _awaited(value: Any) -> Any:
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    return asyncio.run(wait())


def _first_number(name: str, values: Sequence[Any]) -> dict[str, float]:
    """Return what goes into the metrics of what a reward logs: numbers only."""
    return {name: float(values[0])} if len(values) and _is_number(values[0]) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _weighted(part: str) -> Weighted:
    reference, equals, weight = part.rpartition("=")
    try:
        found = Weighted(reference, float(weight)) if equals else Weighted(part, 1.0)
    except ValueError:
        found = Weighted("", 0.0)
    if not (found.reference and math.isfinite(found.weight)):
        raise RewardError(f"rewards are written file.py:function=weight, with commas between several; got {part!r}")
    return found


def _short_names(references: Sequence[str]) -> list[str]:
    short = [reference.removeprefix("builtin:").rpartition(":")[2].rpartition(".")[2] for reference in references]
    return short if len(set(short)) == len(short) else list(references)


def _built_in(reference: str) -> Callable[..., Any]:
    _, name, argument = [*reference.split(":", 2), ""][:3]
    make = builtin.MAKERS.get(name)
    if make is None:
        names = ", ".join(f"builtin:{name}" for name in ("task", *builtin.MAKERS))
        raise RewardError(f"there is no reward {reference!r}; built in are {names}")
    return make(argument)


def _import(where: str, reference: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # modules beside the user, as with python -m
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not Path(where).expanduser().is_file():
            raise FileNotFoundError(f"there is no file {where}")
        folder = str(Path(where).expanduser().resolve().parent)
        if folder not in sys.path:
            sys.path.insert(0, folder)  # its neighbours, as for a script
        return import_file(Path(where))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(f"the reward {reference!r} cannot be imported: {reason}") from error
