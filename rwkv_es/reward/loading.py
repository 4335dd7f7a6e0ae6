"""Where a reward function is: in a file, a module or this package; and which form it has."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rwkv_es.reward import builtin
from rwkv_es.system.errors import RewardError, RwkvEsError, cause
from rwkv_es.task.users import import_file

FORMS = ("task", "plain", "trl", "trl_messages", "verl")
_CONTENT = re.compile(r"(?:\]|\b(?!kwargs\b)\w+)\s*(?:\[|\.get\()\s*[\"']content[\"']")
_MAX_HELPERS = 20  # functions that a reward calls, and those that they call, whose source is looked at


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
    """Tell a function's form by the names of its parameters; whether it wants messages, by its source.

    Raises:
        RewardError: it has none of the known ones.
    """
    parameters = inspect.signature(function).parameters
    required = [p for p in parameters.values() if p.default is p.empty and p.kind in (0, 1)]
    if "solution_str" in parameters:
        return "verl"
    if parameters.keys() & {"completions", "completion_ids", "prompts"}:
        return "trl_messages" if reads_messages(function) else "trl"
    if [p.name for p in required] == ["problem", "text"]:
        return "task"
    if 1 <= len(required) <= 2:
        return "plain"
    raise RewardError(
        f"the reward {reference!r} takes ({', '.join(parameters)}); known forms: f(completions, **columns) of TRL, "
        "compute_score(solution_str, ground_truth) of verl, f(completion, answer); or say which by --reward-signature"
    )


def reads_messages(function: Callable[..., Any]) -> bool:
    """Tell by its source whether a reward of TRL's form takes a completion for a list of messages, not for a text.

    Looked at are the function and what it calls in files of the same folder.
    """
    waiting, seen = [_inner(function)], set[Any]()
    while waiting and len(seen) < _MAX_HELPERS:
        found = waiting.pop()
        code = getattr(found, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        try:
            source = inspect.getsource(found)
        except (OSError, TypeError):
            continue
        if _CONTENT.search(source):
            return True
        called = (_inner(found.__globals__.get(name)) for name in code.co_names)
        waiting += [other for other in called if _is_beside(other, code.co_filename)]
    return False


def _inner(function: Any) -> Any:
    """Return the function behind decorators, `partial`, or an object that can be called."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if hasattr(function, "__code__") else getattr(type(function), "__call__", function)  # noqa: B004


def _is_beside(function: Any, file: str) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and os.path.dirname(code.co_filename) == os.path.dirname(file)


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
    except RwkvEsError:
        raise  # it says by itself what is wrong
    except (Exception, SystemExit) as error:  # as a script of argparse does
        raise RewardError(f"the reward {reference!r} cannot be imported: {cause(error)}") from error
