"""Tasks (a list of problems and a scorer), and where they are found."""

import ast
import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import rwkv_es
from rwkv_es.config.option import MOST_NEW
from rwkv_es.system.errors import RwkvEsError, TaskError, cause
from rwkv_es.task.templates import TEMPLATES
from rwkv_es.task.turns import ONE_TURN, Limits, limits_of
from rwkv_es.task.users import import_file

SPLITS = ("train", "test")


class Key(Enum):
    """Keys of a problem's meta that are no columns of a row: they equal no name that a row can have."""

    PART = "the number of a mixture's part"
    SYSTEM = "a text that stands before the question"


PART, SYSTEM = Key.PART, Key.SYSTEM


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is a text that scores 1.0, "" if none is known; `meta` is for the scorer.

    For a task with an environment it is the answers of an episode that earns 1, a line each.
    """

    prompt: str
    answer: str
    meta: Mapping[Any, Any] = field(default_factory=dict, hash=False)  # columns of a row, and `Key`s


class EvaluationSet(NamedTuple):
    """Problems that a model is judged on, under a name; "": its own task's held-out ones."""

    name: str
    problems: Callable[[], Sequence[Problem]]


@dataclass(frozen=True)
class Task:
    """What a task folder defines. `problems` takes a split; `reward` takes a problem and response prefix + completion.

    A completion ends before a `stop` string, which is dropped, or after one of `stop_included`, which is kept. A task
    with a `timeout_s` has a scorer that may hang: it is killed then, and never called without worker processes. With
    an `environment`, an answer is a turn of an episode, and `reward` is never called.
    """

    name: str
    problems: Callable[[str], Sequence[Problem]]
    reward: Callable[[Problem, str], float | None]
    version: str
    stop: tuple[str, ...]
    max_new_tokens: int
    template: str
    stop_included: tuple[str, ...] = ()
    timeout_s: float = math.inf
    environment: Callable[[Problem], Any] | None = None  # who replies to answers, and gives the rewards
    limits: Limits = ONE_TURN  # of an episode
    parts: tuple["Task", ...] = ()  # of a mixture; and the tasks of evaluation sets
    sets: tuple[EvaluationSet, ...] = ()
    foreign: frozenset[int] = frozenset()  # parts, of evaluation sets, that no reward of the options scores

    def part_of(self, problem: Problem) -> "Task":
        """Return the task that a problem belongs to: of a mixture one of its parts."""
        return self.parts[problem.meta.get(PART, 0)] if self.parts else self

    def is_foreign(self, problem: Problem) -> bool:
        """Say whether a problem is of an evaluation set that its own task scores, whatever trains."""
        return problem.meta.get(PART, 0) in self.foreign

    def judged_on(self) -> tuple[EvaluationSet, ...]:
        """Return what a model is judged on: evaluation sets if there are any, else the task's held-out problems."""
        return self.sets or (EvaluationSet("", partial(self.problems, "test")),)


class Generated(Sequence[Problem]):
    """Problems made when asked for: item i is `make(i)`, a function of i alone."""

    def __init__(self, make: Callable[[int], Problem], size: int) -> None:
        self._make = make
        self._range = range(size)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._range[index]
        return [self._make(i) for i in chosen] if isinstance(chosen, range) else self._make(chosen)


def list_tasks() -> dict[str, str]:
    """Return the built-in tasks: name -> first line of the docstring of its task.py."""
    return {file.parent.name: _first_line(file) for file in sorted(tasks_folder().glob("*/task.py"))}


def load_task(name_or_path: str, data: str = "") -> Task:
    """Load a built-in task by its folder's name, or the user's own from a folder with task.py or a .py file.

    A name or path may go on with `:argument` if the task's `problems` takes an argument.

    Raises:
        TaskError: no such task, it cannot be imported, or something is missing in it.
    """
    where, argument = _split_argument(name_or_path)
    is_path = where.endswith(".py") or any(mark in where for mark in "/\\.~")
    module, name = _import_path(where) if is_path else (_import_built_in(where), where)
    problems, environment = _member(module, "problems", where), getattr(module, "environment", None)
    reward = _member(module, "reward", where) if environment is None else rewarded_by_environment
    if not (callable(problems) and callable(reward) and (environment is None or callable(environment))):
        raise TaskError(f"problems, reward and environment of task {where} must be functions")
    if argument:
        if "argument" not in inspect.signature(problems).parameters:
            raise TaskError(f"task {where} takes no argument; got {argument!r}, so leave the colon out")
        problems, name = partial(problems, argument=argument), f"{name}:{argument}"
    return Task(name, lru_cache(_checked(problems, name_or_path, data)), reward, **_constants(module, where))


def rewarded_by_environment(problem: Problem, text: str) -> float:
    """Stand in for the reward of a task that has an environment."""
    raise TaskError("the rewards of this task come from its environment, turn by turn")


def _split_argument(spec: str) -> tuple[str, str]:
    """Split `name:argument`; a colon before a slash belongs to a path."""
    where, colon, argument = spec.rpartition(":")
    return (where, argument) if colon and where and not re.search(r"[/\\]", argument) else (spec, "")


def tasks_folder() -> Path:
    """Return the folder of the built-in tasks: inside the package in a wheel, beside it in a working tree."""
    package = Path(rwkv_es.__file__).parent
    inside = package / "tasks"
    return inside if inside.is_dir() else package.parent / "tasks"


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _import_built_in(name: str) -> ModuleType:
    if not os.path.isfile(tasks_folder() / name / "task.py"):
        names = list(list_tasks())
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"built-in tasks: {', '.join(names)}"
        own = f" Your own folder is loaded as ./{name}." if os.path.exists(name) else ""
        raise TaskError(f"unknown task {name!r}; {hint}{own}")
    if "rwkv_es.tasks" not in sys.modules:
        package = ModuleType("rwkv_es.tasks")
        package.__path__ = [str(tasks_folder())]
        sys.modules["rwkv_es.tasks"] = rwkv_es.tasks = package
    return _run_import(name, lambda: importlib.import_module(f"rwkv_es.tasks.{name}.task"))


def _import_path(spec: str) -> tuple[ModuleType, str]:
    path = Path(spec).expanduser().resolve()
    file = path / "task.py" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise TaskError(f"task {spec}: there is no file {file}; give a folder with task.py, or a .py file")
    if file.suffix != ".py":
        raise TaskError(f"task {spec}: {file.name} is not a Python file; its name must end in .py")
    module = _run_import(spec, lambda: import_file(file))
    return module, file.parent.name if file.name == "task.py" else file.stem


def _run_import(spec: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except RwkvEsError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"task {spec} cannot be imported: {cause(error)}") from error


_FORMERLY = {"MAX_NEW_TOKENS": ("MAX_NEW",), "STOP_INCLUDED": ("ENDS",)}


def _member(module: ModuleType, name: str, spec: str) -> Any:
    if not hasattr(module, name):
        raise TaskError(
            f"task {spec} does not define {name}; it needs problems, reward or environment, VERSION, STOP, "
            "MAX_NEW_TOKENS, TEMPLATE"
        )
    return getattr(module, name)


def _constants(module: ModuleType, spec: str) -> dict[str, Any]:
    """Read and check the constants of a task, as arguments of `Task`."""
    has_turns = getattr(module, "environment", None) is not None
    names = ("VERSION", "STOP", _name_of(module, "MAX_NEW_TOKENS"), "TEMPLATE")
    version, stop, max_new_tokens, template = (_member(module, name, spec) for name in names)
    if not (isinstance(version, str) and version):
        raise TaskError(f'VERSION of task {spec} must be a string like "1"; got {version!r}')
    if not _are_strings(stop):
        raise TaskError(f"STOP of task {spec} must be a tuple of strings, none of them empty; got {stop!r}")
    if not (isinstance(max_new_tokens, int) and 0 < max_new_tokens <= MOST_NEW):
        raise TaskError(
            f"{names[2]} of task {spec} must be a whole number of tokens from 1 to {MOST_NEW}; got {max_new_tokens!r}"
        )
    if template not in list(TEMPLATES):  # a list: what was given may not be hashable
        raise TaskError(f"TEMPLATE of task {spec} must be one of {', '.join(TEMPLATES)}; got {template!r}")
    return {
        "version": version,
        "stop": tuple(stop),
        "max_new_tokens": max_new_tokens,
        "template": template,
        **_optional(module, spec),
        **({"environment": module.environment, "limits": limits_of(module, spec, max_new_tokens)} if has_turns else {}),
    }


def _name_of(module: ModuleType, name: str) -> str:
    """Return how a module calls a constant: tasks written for 0.1 have its former name."""
    return name if hasattr(module, name) else next((old for old in _FORMERLY[name] if hasattr(module, old)), name)


def _optional(module: ModuleType, spec: str) -> dict[str, Any]:
    name = _name_of(module, "STOP_INCLUDED")
    stop_included, timeout_s = getattr(module, name, ()), getattr(module, "TIMEOUT_S", math.inf)
    if not _are_strings(stop_included):
        raise TaskError(f"{name} of task {spec} must be a tuple of strings, none of them empty; got {stop_included!r}")
    if not (isinstance(timeout_s, (int, float)) and timeout_s > 0):
        raise TaskError(f"TIMEOUT_S of task {spec} must be a number of seconds above 0; got {timeout_s!r}")
    return {"stop_included": tuple(stop_included), "timeout_s": float(timeout_s)}


def _are_strings(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(string, str) and string for string in value)


def _checked(problems: Callable[..., Any], spec: str, data: str) -> Callable[[str], Sequence[Problem]]:
    """Bind the data path to a task's `problems`, and turn what goes wrong in it into a TaskError."""

    def of_split(split: str) -> Sequence[Problem]:
        if split not in SPLITS:
            raise TaskError(f"unknown split {split!r}; it is train or test")
        try:
            found = problems(split, data)
            is_usable = len(found) > 0 and isinstance(found[0], Problem)
        except TaskError:
            raise
        except RwkvEsError as error:  # it says by itself what is wrong
            raise TaskError(str(error)) from error
        except Exception as error:
            raise TaskError(f"problems({split!r}) of task {spec} failed: {cause(error)}") from error
        if not is_usable:
            raise TaskError(
                f"problems({split!r}) of task {spec} must return a sequence of Problem, and not an empty one"
            )
        return found

    return of_split
