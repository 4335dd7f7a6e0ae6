"""Environments in TRL's form (environment_factory): --task trl_environment --data file.py."""

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rwkv_es.reward.values import awaited
from rwkv_es.system.errors import TaskError
from rwkv_es.task import Done, Generated, Problem
from rwkv_es.task.division import divided
from rwkv_es.task.messages import Messages, asked, messages_of, wanted
from rwkv_es.task.users import import_file

VERSION = "1"
STOP = ("\n\nUser:",)
STOP_INCLUDED = ("</tool_call>",)
MAX_NEW_TOKENS = 512
TEMPLATE = "chat"
MAX_TURNS = 32

NUM_PROMPTS = 256  # of an environment without a data set
_NO_TOOLS = ("reset", "get_reward")

_HOW = 'You may call tools, one at a time: <tool_call>{"name": "NAME", "arguments": {...}}</tool_call>. There are:'
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Return the rows of a file's `train_dataset` (or `dataset`); it also has `environment_factory` and `reward_funcs`.

    Without an `eval_dataset`, a hash of the row holds out a tenth. Without any data set, the environment gives the
    prompts itself: as many as the file's NUM_PROMPTS says, or 256, of which the last tenth is held out.
    """
    module = _loaded(data)
    train: Sequence[dict[str, Any]]
    train = [dict(row) for row in getattr(module, "train_dataset", None) or getattr(module, "dataset", None) or []]
    held_out: Sequence[dict[str, Any]] = [dict(row) for row in getattr(module, "eval_dataset", None) or []]
    if not train:
        count = getattr(module, "NUM_PROMPTS", NUM_PROMPTS)
        train, held_out = [{}] * (count - max(1, count // 10)), held_out or [{}] * max(1, count // 10)
    if not held_out:
        train, held_out = divided(train, str)
    rows = train if split == "train" else held_out
    return Generated(lambda index: _problem(rows[index], data), len(rows))


class environment:
    """An episode: answers call the environment's public methods; the first that calls none, or the last, is scored."""

    def __init__(self, problem: Problem) -> None:
        self.module, self.row = _loaded(problem.meta["file"]), problem.meta["row"]
        self.made, _ = _reset(self.module, self.row)
        self.messages: Messages = []

    def reply(self, text: str) -> str | Done:
        """Return the tools' results, or the reward if no tool is called."""
        calls = [_parsed(call) for call in _CALL.findall(text)]
        message: dict[str, Any] = {"role": "assistant", "content": text.removeprefix(" ")}
        if not calls:
            self.messages.append(message)
            return self.cut()
        functions = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given, _ in calls]
        self.messages.append({**message, "tool_calls": functions})
        results = [(name, error or _called(self.made, name, given)) for name, given, error in calls]
        self.messages += [{"role": "tool", "name": name, "content": result} for name, result in results]
        return "\n".join(f"<tool_response>{result}</tool_response>" for _, result in results)

    def cut(self) -> Done:
        """Score what there is; also where a limit ends the episode, as the trainer does."""
        return Done(_reward(self.module, self.row, self.made, self.messages))


def tools_of(made: Any) -> dict[str, Any]:
    """Return an environment's tools: its class's public methods, but `reset` and `get_reward`."""
    names = [name for name, _ in inspect.getmembers(type(made), inspect.isfunction)]
    return {name: getattr(made, name) for name in names if not name.startswith("_") and name not in _NO_TOOLS}


def _parsed(call: str) -> tuple[str, dict[str, Any], str]:
    """Read a call. Returns the tool's name, the arguments, and what is wrong with it."""
    try:
        found = json.loads(call)
        return str(found["name"]), dict(found.get("arguments") or {}), ""
    except Exception as error:  # noqa: BLE001  anything may stand there
        return "unknown", {}, _said(error)


def _called(made: Any, name: str, given: dict[str, Any]) -> str:
    """Call a tool; what goes wrong is told to the model, which may mend its call."""
    try:
        return str(awaited(tools_of(made)[name](**given)))
    except Exception as error:  # noqa: BLE001  a tool's own, or no such tool
        return _said(error)


def _said(error: Exception) -> str:
    return f"error: {' '.join(f'{type(error).__name__}: {error}'.split())[:500]}"


def _reward(module: ModuleType, row: Mapping[str, Any], made: Any, messages: Messages) -> float | None:
    """Add up what the reward functions say by their weights, and the environment itself; None: nobody says anything."""
    prompt = _prompt(row)
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    given = {**columns, "prompts": [prompt], "completions": [messages], "environments": [made]}
    functions = _functions(module)
    weights = getattr(module, "reward_weights", None) or [1.0] * len(functions)
    found = [
        (weight, awaited(function(**wanted(function, given)))[0])
        for function, weight in zip(functions, weights, strict=True)
    ]
    if callable(own := getattr(made, "get_reward", None)):
        found.append((1.0, awaited(own())))
    elif not functions:
        raise TaskError(
            "a file of TRL's form needs reward_funcs, or environments with get_reward: who pays the answers?"
        )
    values = [weight * float(value) for weight, value in found if value is not None]
    return math.fsum(values) if values else None


def _functions(module: ModuleType) -> list[Any]:
    found = getattr(module, "reward_funcs", None) or getattr(module, "reward_func", None) or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _prompt(row: Mapping[str, Any]) -> Messages:
    """Return a row's messages; an environment that gives the prompt itself adds to an empty one."""
    return messages_of(row.get("prompt", ""))


def _reset(module: ModuleType, row: Mapping[str, Any]) -> tuple[Any, str]:
    """Make an environment for a row: of one kind, or of the row's. Returns it, and what `reset` adds to the prompt."""
    factory, given = module.environment_factory, dict(row)
    if isinstance(factory, dict):
        factory = factory[given.pop("environment", None)]
    made = factory()
    said = awaited(made.reset(**wanted(made.reset, given)))
    if isinstance(said, list):  # parts, of which the texts can be read
        said = "".join(str(part.get("text", "")) for part in said)
    return made, said if isinstance(said, str) else ""


@lru_cache(maxsize=4)
def _loaded(data: str) -> ModuleType:
    if not data.endswith(".py"):
        raise TaskError(f"trl_environment reads a Python file: --data file.py; got {data!r}")
    module = import_file(Path(data))
    factory = getattr(module, "environment_factory", None)
    if not (callable(factory) or (factory and isinstance(factory, dict))):
        raise TaskError(f"{data} defines no environment_factory, as GRPOTrainer takes it")
    return module


def _problem(row: dict[str, Any], data: str) -> Problem:
    made, said = _reset(_loaded(data), row)
    lines = [
        f"- {name}{inspect.signature(tool)}: {' '.join((inspect.getdoc(tool) or '').split())}"
        for name, tool in tools_of(made).items()
    ]
    question, meta = asked(_prompt(row))
    text = "\n".join([question + said, *([_HOW, *lines] if lines else [])])
    return Problem(text, "", {**meta, "row": row, "file": data})
