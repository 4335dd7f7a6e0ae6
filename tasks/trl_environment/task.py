"""Environments in TRL's form (environment_factory): --task trl_environment --data file.py."""

import inspect
import json
import math
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
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

_HOW = 'You may call tools, one at a time: <tool_call>{"name": "NAME", "arguments": {...}}</tool_call>. There are:'
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def problems(split: str, data: str = "") -> Sequence[Problem]:
    """Return the rows of a file's `train_dataset` (or `dataset`); it also has `environment_factory` and `reward_funcs`.

    Without an `eval_dataset`, a hash of the question holds out a tenth.
    """
    module = _loaded(data)
    train: Sequence[dict[str, Any]]
    train = [dict(row) for row in getattr(module, "train_dataset", None) or getattr(module, "dataset", [])]
    held_out: Sequence[dict[str, Any]] = [dict(row) for row in getattr(module, "eval_dataset", None) or []]
    if not held_out:
        train, held_out = divided(train, lambda row: str(row["prompt"]))
    rows = train if split == "train" else held_out
    return Generated(lambda index: _problem(rows[index], data), len(rows))


def environment(problem: Problem) -> Generator[str | None, str, Done]:
    """Let answers call the environment's public methods; the first that calls none, or the last one, is scored."""
    module, row = _loaded(problem.meta["file"]), problem.meta["row"]
    made, _ = _reset(module, row)
    messages: Messages = []
    answer = yield None
    for turn in range(MAX_TURNS):
        messages.append({"role": "assistant", "content": answer.removeprefix(" ")})
        calls = _CALL.findall(answer)
        if not calls or turn == MAX_TURNS - 1:
            break
        results = [_called(made, call) for call in calls]
        messages += [{"role": "tool", "content": result} for result in results]
        answer = yield "\n".join(f"<tool_response>{result}</tool_response>" for result in results)
    return Done(_reward(module, row, made, messages))


def tools_of(made: Any) -> dict[str, Any]:
    """Return an environment's tools: its public methods, but `reset`."""
    methods = inspect.getmembers(made, inspect.ismethod)
    return {name: method for name, method in methods if not name.startswith("_") and name != "reset"}


def _called(made: Any, call: str) -> str:
    """Call a tool; what goes wrong is told to the model, which may mend its call."""
    try:
        found = json.loads(call)
        return str(awaited(tools_of(made)[found["name"]](**found.get("arguments", {}))))
    except Exception as error:  # noqa: BLE001  a tool's own, or no such tool
        return f"error: {' '.join(f'{type(error).__name__}: {error}'.split())[:500]}"


def _reward(module: ModuleType, row: Mapping[str, Any], made: Any, messages: Messages) -> float | None:
    """Add up what the reward functions say; None where none of them applies."""
    prompt = messages_of(row["prompt"])
    columns = {name: [value] for name, value in row.items() if name != "prompt"}
    given = {**columns, "prompts": [prompt], "completions": [messages], "environments": [made]}
    found = [awaited(function(**wanted(function, given))) for function in _functions(module)]
    values = [values[0] for values in found if values[0] is not None]
    return math.fsum(float(value) for value in values) if values else None


def _functions(module: ModuleType) -> Iterator[Any]:
    found = getattr(module, "reward_funcs", None) or getattr(module, "reward_func", None)
    if found is None:
        raise TaskError("a file of TRL's form needs reward_funcs: what GRPOTrainer is given under that name")
    yield from found if isinstance(found, (list, tuple)) else [found]


def _reset(module: ModuleType, row: Mapping[str, Any]) -> tuple[Any, str]:
    """Make an environment for a row. Returns it, and what its `reset` adds to the last message."""
    made = module.environment_factory()
    said = awaited(made.reset(**wanted(made.reset, row)))
    return made, said if isinstance(said, str) else ""


@lru_cache(maxsize=4)
def _loaded(data: str) -> ModuleType:
    if not data.endswith(".py"):
        raise TaskError(f"trl_environment reads a Python file: --data file.py; got {data!r}")
    module = import_file(Path(data))
    if not callable(getattr(module, "environment_factory", None)):
        raise TaskError(f"{data} defines no environment_factory, as GRPOTrainer takes it")
    return module


def _problem(row: dict[str, Any], data: str) -> Problem:
    made, said = _reset(_loaded(data), row)
    lines = [
        f"- {name}{inspect.signature(tool)}: {' '.join((inspect.getdoc(tool) or '').split())}"
        for name, tool in tools_of(made).items()
    ]
    question, meta = asked(messages_of(row["prompt"]))
    text = "\n".join([question + said, *([_HOW, *lines] if lines else [])])
    return Problem(text, "", {**meta, "row": row, "file": data})
