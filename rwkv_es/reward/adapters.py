"""Reward functions as TRL, verl and plain Python write them, called as they are; and several of them with weights."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from rwkv_es.reward.loading import FORMS, form_of, load_function
from rwkv_es.reward.values import awaited, listed, metric, number
from rwkv_es.system.errors import RewardError
from rwkv_es.task.task import Problem, Task

SIGNATURES = ("auto", *FORMS)
GIVEN_OTHERWISE = ("prompt", "prompts", "completion", "completions")  # columns of these names are never passed


class Answer(NamedTuple):
    """What is scored. `text` is response prefix + completion."""

    problem: Problem
    text: str
    token_ids: Sequence[int] | None = None  # of the completion alone; None: nobody gave them
    step: int = 0


class Outcome(NamedTuple):
    """A reward (None: not applicable), and numbers for the metrics."""

    value: Any
    logs: dict[str, float]


class Scorer(NamedTuple):
    """What scores answers. One that compares sees those together that answer a problem in a group."""

    score: Callable[[Sequence[Answer]], list[Outcome]]
    compares: bool = False


class Weighted(NamedTuple):
    """One reward of the options: `file.py:fn=0.7`."""

    reference: str
    weight: float


def load_scorer(task: Task, rewards: str, signature: str = "auto") -> Scorer:
    """Return what scores an answer: the task's own reward, or the weighted sum of those that the options name.

    A reward that is not applicable (None) is left out of the sum; if all are, the sum is.

    Raises:
        RewardError: a function cannot be loaded, or its form is not known.
    """
    if not rewards:
        return Scorer(_each(lambda answer: Outcome(task.reward(answer.problem, answer.text), {})))
    weighted = parse_rewards(rewards)
    scorers = [_load(part.reference, task, signature) for part in weighted]
    names = _short_names([part.reference for part in weighted])

    def score(answers: Sequence[Answer]) -> list[Outcome]:
        by_reward = [scorer.score(answers) for scorer in scorers]
        return [_sum(weighted, names, outcomes) for outcomes in zip(*by_reward, strict=True)]

    return of_own(Scorer(score, any(scorer.compares for scorer in scorers)), task)


def of_own(scorer: Scorer, task: Task) -> Scorer:
    """Return the scorer, but for answers to evaluation sets of other tasks than the one that trains: those score them.

    All answers that are scored together are of one set.
    """
    by_task = _each(lambda answer: Outcome(task.reward(answer.problem, answer.text), {}))

    def score(answers: Sequence[Answer]) -> list[Outcome]:
        return (by_task if task.is_foreign(answers[0].problem) else scorer.score)(answers)

    return Scorer(score, scorer.compares) if task.foreign else scorer


def _each(score: Callable[[Answer], Outcome]) -> Callable[[Sequence[Answer]], list[Outcome]]:
    return lambda answers: [score(answer) for answer in answers]


def _sum(weighted: Sequence[Weighted], names: Sequence[str], outcomes: Sequence[Outcome]) -> Outcome:
    """Add up what several rewards say of one answer."""
    values = [number(outcome.value, f"the reward {name}") for name, outcome in zip(names, outcomes)]
    logs = {f"log/{key}": value for outcome in outcomes for key, value in outcome.logs.items()}
    logs.update({f"reward/{name}": value for name, value in zip(names, values) if value is not None})
    terms = [part.weight * value for part, value in zip(weighted, values) if value is not None]
    return Outcome(sum(terms) if terms else None, logs)


def parse_rewards(spec: str) -> list[Weighted]:
    """Read `file.py:fn=0.7,pkg.mod:fn2=0.3`; a weight left out is 1.

    Raises:
        RewardError: a weight is no number, or a name is missing.
    """
    return [_weighted(part.strip()) for part in spec.split(",")]


def gold_of(problem: Problem) -> Any:
    """Return what a foreign reward compares with: the row's own answer, unchanged if there is one."""
    verl = problem.meta.get("reward_model")
    for found in (problem.meta, verl if isinstance(verl, Mapping) else {}):
        if found.get("ground_truth") is not None:
            return found["ground_truth"]
    answer = problem.meta.get("answer")
    return problem.answer if answer is None else answer


def _load(reference: str, task: Task, signature: str) -> Scorer:
    if reference == "builtin:task":
        return Scorer(_each(lambda answer: Outcome(task.reward(answer.problem, answer.text), {})))
    is_own = signature == "auto" or reference.startswith("builtin:")
    return scorer_of(load_function(reference), task, "auto" if is_own else signature, reference)


def scorer_of(function: Callable[..., Any], task: Task, signature: str = "auto", reference: str = "") -> Scorer:
    """Return what scores answers by a function of one of the known forms.

    Raises:
        RewardError: its form is not known.
    """
    form = form_of(function, reference or getattr(function, "__name__", "given")) if signature == "auto" else signature
    parameters = inspect.signature(function).parameters
    if form in ("trl", "trl_messages"):
        return Scorer(partial(_call_trl, form == "trl_messages", function, parameters), compares=True)
    if form == "verl":
        return Scorer(_each(lambda answer: _call_verl(function, parameters, answer, task.part_of(answer.problem).name)))
    return Scorer(_each(partial(_call_task if form == "task" else _call_plain, function, parameters)))


def _call_task(function: Callable[..., Any], _: Any, answer: Answer) -> Outcome:
    return Outcome(awaited(function(answer.problem, answer.text)), {})


def _call_plain(function: Callable[..., Any], parameters: Mapping[str, Any], answer: Answer) -> Outcome:
    arguments = (answer.text.lstrip(" "), gold_of(answer.problem))
    takes_all = len(parameters) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    return Outcome(awaited(function(*arguments[: 2 if takes_all else 1])), {})


def _call_verl(function: Callable[..., Any], parameters: Mapping[str, Any], answer: Answer, name: str) -> Outcome:
    meta = answer.problem.meta
    given = {
        "data_source": name if meta.get("data_source") is None else meta["data_source"],
        "solution_str": answer.text.lstrip(" "),
        "ground_truth": gold_of(answer.problem),
        "extra_info": _named(meta) if meta.get("extra_info") is None else meta["extra_info"],
    }
    found = awaited(function(**_wanted(given, parameters)))
    if not isinstance(found, Mapping):
        return Outcome(found, {})
    if "score" not in found:
        raise ValueError(f"a reward of verl's form that returns a dict needs the key 'score'; got {sorted(found)}")
    logs = {key: metric(value) for key, value in found.items() if key != "score"}
    return Outcome(found["score"], {key: value for key, value in logs.items() if value is not None})


def _call_trl(
    has_messages: bool, function: Callable[..., Any], parameters: Mapping[str, Any], answers: Sequence[Answer]
) -> list[Outcome]:
    """Call for answers to one problem or several: lists of as many entries as there are answers."""
    count = len(answers)
    asked = [_asked(answer.problem, has_messages) for answer in answers]
    texts = [answer.text.lstrip(" ") for answer in answers]
    logs: list[dict[str, float]] = [{} for _ in answers]
    rows = [_columns(answer.problem) for answer in answers]
    names = dict.fromkeys(name for row in rows for name in row)
    given: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    given.update(
        prompts=asked,
        completions=[t if isinstance(q, str) else [{"role": "assistant", "content": t}] for q, t in zip(asked, texts)],
        trainer_state=SimpleNamespace(global_step=answers[0].step),
        log_extra=lambda name, values: _log(logs, name, values),
        log_metric=lambda name, value: _log(logs, name, [value] * count),
    )
    if answers[0].token_ids is not None:
        given["completion_ids"] = [list(answer.token_ids or ()) for answer in answers]
    elif "completion_ids" in parameters:
        raise ValueError("this reward reads completion_ids, but no token ids are known in this call")
    values = listed(awaited(function(**_wanted(given, parameters))), count)
    return [Outcome(value, logged) for value, logged in zip(values, logs)]


def _asked(problem: Problem, has_messages: bool) -> Any:
    """Return a question as TRL's rewards get it: the row's own messages, messages made of it, or a text."""
    own = problem.meta.get("prompt")
    if isinstance(own, (list, tuple)):
        return own
    return [{"role": "user", "content": problem.prompt}] if has_messages else problem.prompt


def _log(logs: Sequence[dict[str, float]], name: str, values: Sequence[Any]) -> None:
    """Keep what goes into the metrics of what a reward logs: numbers only."""
    for of_answer, value in zip(logs, values):
        found = metric(value)
        if found is not None:
            of_answer[name] = found


def _columns(problem: Problem) -> dict[str, Any]:
    return _named({"answer": problem.answer, **problem.meta})


def _named(meta: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the columns of a row in a problem's meta, but those that are given otherwise."""
    return {name: value for name, value in meta.items() if isinstance(name, str) and name not in GIVEN_OTHERWISE}


def _wanted(given: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(given)
    return {name: value for name, value in given.items() if name in parameters}


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
