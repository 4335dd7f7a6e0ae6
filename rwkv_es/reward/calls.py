"""`rwkv-es reward check`: what a reward is called with and what it pays, as text, before any training."""

import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

from rwkv_es.config.options import Config
from rwkv_es.reward.adapters import Answer, load_scorer, parse_rewards, scorer_of
from rwkv_es.reward.loading import form_of, load_function
from rwkv_es.reward.values import number
from rwkv_es.system.errors import own_traceback
from rwkv_es.system.texts import printable
from rwkv_es.task.division import Side
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.task import Problem, Task

NUM_PROBLEMS = 3  # of the training problems, the first
_MAX_CHARS, _MAX_ITEMS = 100, 3


def check_reward(config: Config, answered: Callable[[Task, list[Problem]], list[list[str]]] | None) -> None:
    """Print for each reward and a few problems: the call, and what the reference, a wrong answer and none earn.

    answered: lets a model answer too.

    Raises:
        RwkvEsError: task, data, reward or model cannot be loaded.
    """
    task = load_tasks(config.task, config.data)
    found = task.problems("train")
    problems = list((found.whole if isinstance(found, Side) else found)[:NUM_PROBLEMS])  # of a file as it stands
    sampled = answered(task, problems) if answered is not None else [[] for _ in problems]
    for part in parse_rewards(config.reward):
        print(form_in_words(part.reference, config.reward_signature))
        for place, problem in enumerate(problems):
            print(f"\n  problem {place + 1}: {problem.prompt[:200]!r}")
            for title, texts in _tried(problems, place, sampled[place]):
                answers = [Answer(problem, text, []) for text in texts]
                print(f"  {title}:")
                print(printable("\n".join(score_shown(task, part.reference, config.reward_signature, answers))))
    if answered is None:
        print("\nwith --model a model answers too")


def _tried(problems: list[Problem], place: int, sampled: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield what is scored together: the reference with others beside it, and what a model says."""
    others = [other.answer for other in problems if other.answer != problems[place].answer][:1]
    if problems[place].answer:
        yield "the reference answer", [problems[place].answer]
    yield "another problem's answer, and none", [*others, ""]
    if sampled:
        yield "the model's answers", sampled


def recorded(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    """Return a function that does the same and notes each call as text."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        given = [*map(shortened, arguments), *(f"{name}={shortened(value)}" for name, value in named.items())]
        calls.append(f"{getattr(function, '__name__', 'reward')}({', '.join(given)})")
        return function(*arguments, **named)

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


def shortened(value: Any) -> str:
    """Return a value as a call shows it: both ends of long texts, the first entries of long lists."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = _MAX_CHARS
    short.maxlist = short.maxtuple = short.maxdict = _MAX_ITEMS
    return "<function>" if inspect.isfunction(value) else short.repr(value)


def form_in_words(reference: str, signature: str) -> str:
    """Say which form a reward has.

    Raises:
        RewardError: it cannot be loaded, or has no known form.
    """
    function = load_function(reference)
    form = form_of(function, reference) if signature == "auto" else signature
    parameters = ", ".join(inspect.signature(function).parameters)
    told = "inferred from its parameters" if signature == "auto" else "as you say"
    return f"{reference} ({parameters}): called as {form}, {told}"


def score_shown(task: Task, reference: str, signature: str, answers: Sequence[Answer]) -> list[str]:
    """Score answers to one problem together, and return as lines the call, what each earned, or the failure."""
    calls: list[str] = []
    began = perf_counter()
    try:
        if reference.startswith("builtin:"):
            scorer = load_scorer(task, reference)
        else:
            scorer = scorer_of(recorded(load_function(reference), calls), task, signature, reference)
        outcomes = scorer.score(answers)
        values = [number(outcome.value) for outcome in outcomes]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  the user's own code, which may also call sys.exit
        return [*(f"  {call}" for call in calls[-1:]), *(f"    {line}" for line in own_traceback(error).splitlines())]
    took = perf_counter() - began
    lines = [f"  {call}" for call in calls[:1]] if scorer.compares else []
    for place, (answer, outcome, value) in enumerate(zip(answers, outcomes, values)):
        if not scorer.compares and place < len(calls):
            lines.append(f"  {calls[place]}")
        logs = f"  logs {outcome.logs}" if outcome.logs else ""
        lines.append(f"    {shortened(answer.text)} -> {'not applicable' if value is None else f'{value:g}'}{logs}")
    return [*lines, f"    in {took * 1000:.1f} ms"]
