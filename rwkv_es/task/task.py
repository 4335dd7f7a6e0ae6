"""Tasks (a list of problems and a scorer), where they are found, and the prompts around a question."""

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
from rwkv_es.errors import ConfigError, TaskError, cause
from rwkv_es.task.users import import_file

SPLITS = ("train", "test")


class Key(Enum):
    """Keys of a problem's meta that are no columns of a row: they equal no name that a row can have."""

    PART = "the number of a mixture's part"
    SYSTEM = "a text that stands before the question"


PART, SYSTEM = Key.PART, Key.SYSTEM


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is a text that scores 1.0, "" if none is known; `meta` is for the scorer."""

    prompt: str
    answer: str
    meta: Mapping[Any, Any] = field(default_factory=dict, hash=False)  # columns of a row, and `Key`s


@dataclass(frozen=True)
class Task:
    """What a task folder defines. `problems` takes a split; `reward` takes a problem and opening + completion.

    A completion ends before a `stop` string, which is dropped, or after one of `ends`, which is kept. A task with a
    `timeout_s` has a scorer that may hang: it is killed then, and never called without worker processes.
    """

    name: str
    problems: Callable[[str], Sequence[Problem]]
    reward: Callable[[Problem, str], float | None]
    version: str
    stop: tuple[str, ...]
    max_new: int
    template: str
    ends: tuple[str, ...] = ()
    timeout_s: float = math.inf
    parts: tuple["Task", ...] = ()  # of a mixture

    def part_of(self, problem: Problem) -> "Task":
        """Return the task that a problem belongs to: of a mixture one of its parts."""
        return self.parts[problem.meta.get(PART, 0)] if self.parts else self


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


class Template(NamedTuple):
    """The prompt is `before` (with the question for {q}) + `opening`; the text scored is `opening` + completion."""

    before: str
    opening: str = ""
    stop: tuple[str, ...] = ()  # besides the task's own


_TURN = "User: {q}\n\nAssistant:"
TEMPLATES: dict[str, Template] = {
    "chat": Template(_TURN),
    "think": Template(_TURN, " <think"),  # without ">": "<think>" would be tokens that the model was not trained on
    "short_think": Template(_TURN, " <think>\n</think"),
    "system": Template(_TURN),  # with a system text, which chat, think and short_think may have
    "assistant_think": Template(  # EGGROLL's prompt for Countdown and AIME, as published
        "User: You are a helpful assistant. You first think about the reasoning process in your mind and then "
        "provide the user with the answer. Question: {q}. Assistant:",
        " <think",
    ),
    "flower": Template("User✿{q}✿\nBot✿", "<think", ("✿",)),
    "raw": Template("{q}"),
}


def render(template: str, question: str, system: str = "", examples: str = "") -> str:
    """Return the prompt to send: system text, solved examples (as they are), question.

    Blank lines inside the question are closed up (not for "raw").

    Raises:
        ConfigError: unknown template, one that has no place for the system text, or that lacks it.
    """
    before, start, _ = template_named(template)
    if system and not before.startswith("User: {q}"):
        raise ConfigError(f"the template {template} has no place for a system text; use system, think or short_think")
    if template == "system" and not system:
        raise ConfigError("the template system needs a text: --system TEXT")
    if template != "raw":
        question = _without_blank_lines(question)
    header = f"System: {_without_blank_lines(system)}\n\n" if system else ""
    return header + examples + before.replace("{q}", question) + start


def opening(template: str) -> str:
    """Return the start of the model's answer that the prompt already holds, and that is scored with it.

    Raises:
        ConfigError: unknown template.
    """
    return template_named(template).opening


def template_named(name: str) -> Template:
    """Return a template.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def unix_lines(text: str) -> str:
    """Return a text whose lines end in a line feed alone, whatever they ended in."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_blank_lines(text: str) -> str:
    return re.sub(r"\n(?:[^\S\n]*\n)+", "\n", unix_lines(text)).strip()


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
    problems, reward = _member(module, "problems", where), _member(module, "reward", where)
    if not (callable(problems) and callable(reward)):
        raise TaskError(f"problems and reward of task {where} must be functions")
    if argument:
        if "argument" not in inspect.signature(problems).parameters:
            raise TaskError(f"task {where} takes no argument; got {argument!r}, so leave the colon out")
        problems, name = partial(problems, argument=argument), f"{name}:{argument}"
    return Task(name, lru_cache(_checked(problems, name_or_path, data)), reward, **_constants(module, where))


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
    except Exception as error:
        raise TaskError(f"task {spec} cannot be imported: {cause(error)}") from error


def _member(module: ModuleType, name: str, spec: str) -> Any:
    if not hasattr(module, name):
        raise TaskError(
            f"task {spec} does not define {name}; it needs problems, reward, VERSION, STOP, MAX_NEW, TEMPLATE"
        )
    return getattr(module, name)


def _constants(module: ModuleType, spec: str) -> dict[str, Any]:
    """Read and check the constants of a task, as arguments of `Task`."""
    version, stop, max_new, template = (_member(module, n, spec) for n in ("VERSION", "STOP", "MAX_NEW", "TEMPLATE"))
    if not (isinstance(version, str) and version):
        raise TaskError(f'VERSION of task {spec} must be a string like "1"; got {version!r}')
    if not _are_strings(stop):
        raise TaskError(f"STOP of task {spec} must be a tuple of strings, none of them empty; got {stop!r}")
    if not (isinstance(max_new, int) and 0 < max_new <= MOST_NEW):
        raise TaskError(
            f"MAX_NEW of task {spec} must be a whole number of tokens from 1 to {MOST_NEW}; got {max_new!r}"
        )
    if template not in list(TEMPLATES):  # a list: what was given may not be hashable
        raise TaskError(f"TEMPLATE of task {spec} must be one of {', '.join(TEMPLATES)}; got {template!r}")
    return {
        "version": version,
        "stop": tuple(stop),
        "max_new": max_new,
        "template": template,
        **_optional(module, spec),
    }


def _optional(module: ModuleType, spec: str) -> dict[str, Any]:
    ends, timeout_s = getattr(module, "ENDS", ()), getattr(module, "TIMEOUT_S", math.inf)
    if not _are_strings(ends):
        raise TaskError(f"ENDS of task {spec} must be a tuple of strings, none of them empty; got {ends!r}")
    if not (isinstance(timeout_s, (int, float)) and timeout_s > 0):
        raise TaskError(f"TIMEOUT_S of task {spec} must be a number of seconds above 0; got {timeout_s!r}")
    return {"ends": tuple(ends), "timeout_s": float(timeout_s)}


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
        except Exception as error:
            raise TaskError(f"problems({split!r}) of task {spec} failed: {cause(error)}") from error
        if not is_usable:
            raise TaskError(
                f"problems({split!r}) of task {spec} must return a sequence of Problem, and not an empty one"
            )
        return found

    return of_split
