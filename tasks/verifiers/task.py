"""Environments of the verifiers library, single- and multi-turn: --task verifiers --data file.py, or verifiers:NAME."""

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import TaskError
from rwkv_es.task import Done, Generated, Problem
from rwkv_es.task.division import divided
from rwkv_es.task.messages import Messages, asked, messages_of, wanted
from rwkv_es.task.users import import_file

VERSION = "1"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 512
TEMPLATE = "chat"
MAX_TURNS = 32


def problems(split: str, data: str = "", argument: str = "") -> Sequence[Problem]:
    """Return the rows of an environment: `data` is a file with `load_environment()`, the argument a module's name.

    Without data for evaluation, a hash of the question holds out a tenth of the training data.
    """
    if bool(data) == bool(argument):
        raise TaskError("name one environment: --task verifiers --data file.py, or --task verifiers:MODULE")
    rows = _rows(data, argument, split)
    return Generated(lambda index: _problem(rows[index], (data, argument)), len(rows))


class environment:
    """An episode: answers go into the messages, the library's own methods say what follows and what it earns."""

    def __init__(self, problem: Problem) -> None:
        self.made = _loaded(*problem.meta["source"])
        row = problem.meta["row"]
        self.state: dict[str, Any] = {
            **row,
            **{"prompt": _prompt(self.made, row), "completion": [], "trajectory": [], "responses": [], "turn": 0},
            **{"answer": row.get("answer", ""), "info": row.get("info") or {}, "task": row.get("task", "default")},
            "is_completed": False,
        }
        self.is_set_up = False

    async def reply(self, text: str) -> str | Done:
        """Return the environment's messages, or the reward when a stop condition holds."""
        state = self.state
        if not self.is_set_up:
            self.is_set_up = True
            self.state = state = await _awaited(self.made.setup_state(state)) or state
        message = {"role": "assistant", "content": text.removeprefix(" ")}
        step = {"prompt": [*state["prompt"], *state["completion"]], "completion": [message]}
        state["completion"].append(message)
        state["trajectory"].append(step)
        state["turn"] += 1
        if await self.is_over():
            return Done(await self.reward())
        found = await _awaited(self.made.env_response([*state["prompt"], *state["completion"]], state))
        said = messages_of(found[0] if isinstance(found, tuple) else found)
        state["completion"].extend(said)
        shown = "\n".join(str(each["content"]) for each in said)
        if state.get("final_env_response") is not None or (isinstance(found, tuple) and await self.is_over()):
            return Done(await self.reward(), shown)
        return shown

    async def cut(self) -> Done:
        """Let the rubric score an episode that a limit has ended."""
        self.state["is_truncated"] = True
        return Done(await self.reward())

    async def is_over(self) -> bool:
        """Ask the library's stop conditions; a single turn is over after its answer."""
        most = getattr(self.made, "max_turns", 1)
        if 0 < most <= self.state["turn"] or not hasattr(self.made, "env_response"):
            return True
        check = self.made.is_completed
        arguments = [[*self.state["prompt"], *self.state["completion"]], self.state]
        takes_messages = "messages" in inspect.signature(check).parameters
        return bool(await _awaited(check(*(arguments if takes_messages else arguments[1:]))))

    async def reward(self) -> float:
        """Add up the rubric's functions by their weights."""
        names = ("prompt", "completion", "answer", "info", "task")
        given = {**self.state, **{name: self.state[name] for name in names}, "state": self.state}
        terms = [
            weight * float(await _awaited(function(**wanted(function, {**given, **objects}))))
            for function, weight, objects in _functions(self.made.rubric)
            if weight
        ]
        return math.fsum(terms)


def _functions(rubric: Any) -> Iterator[tuple[Any, float, Mapping[str, Any]]]:
    """Yield a rubric's functions, those of the rubrics in it, with weights and the objects that they may ask for."""
    for part in getattr(rubric, "rubrics", ()):
        yield from _functions(part)
    functions = getattr(rubric, "funcs", None) or getattr(rubric, "reward_funcs", None) or []
    weights = getattr(rubric, "weights", None) or getattr(rubric, "reward_weights", None) or [1.0] * len(functions)
    objects = {"parser": getattr(rubric, "parser", None), **getattr(rubric, "class_objects", {})}
    for function, weight in zip(functions, weights, strict=True):
        yield function, weight, objects


@lru_cache(maxsize=4)
def _loaded(data: str, argument: str) -> Any:
    if not data:
        try:
            module = importlib.import_module(argument.replace("-", "_"))
        except ImportError as error:
            raise TaskError(
                f"verifiers:{argument}: there is no such module ({error}); install the environment"
            ) from None
    else:
        module = import_file(Path(data))
    if not hasattr(module, "load_environment"):
        raise TaskError(f"{data or argument} defines no load_environment(), as environments of verifiers do")
    return module.load_environment()


def _rows(data: str, argument: str, split: str) -> Sequence[dict[str, Any]]:
    made = _loaded(data, argument)
    train: Sequence[dict[str, Any]]
    held_out: Sequence[dict[str, Any]]
    train, held_out = ([dict(row) for row in found] for found in (_dataset(made, ""), _dataset(made, "eval_")))
    if not held_out or held_out == train:
        train, held_out = divided(train, lambda row: str(row.get("prompt") or row["question"]))
    return train if split == "train" else held_out


def _dataset(made: Any, kind: str) -> Sequence[Mapping[str, Any]]:
    if getattr(made, f"{kind}dataset", None) is not None:
        return getattr(made, f"{kind}dataset")
    try:
        return getattr(made, f"get_{kind}dataset")()
    except (AttributeError, ValueError):
        return []


def _prompt(made: Any, row: Mapping[str, Any]) -> Messages:
    """Return a row's messages; a bare question gets the environment's system text and examples."""
    if row.get("prompt"):
        return messages_of(row["prompt"])
    system = getattr(made, "system_prompt", None)
    before = [{"role": "system", "content": system}] if system else []
    return [*before, *messages_of(getattr(made, "few_shot", None) or []), *messages_of(row["question"])]


def _problem(row: dict[str, Any], source: tuple[str, str]) -> Problem:
    question, meta = asked(_prompt(_loaded(*source), row))
    return Problem(question, "", {**meta, "row": row, "source": source})


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
