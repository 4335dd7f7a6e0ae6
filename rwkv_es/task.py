"""Tasks (a list of problems and a scorer), where they are found, and the prompts around a question."""

import ast
import difflib
import gzip
import importlib
import importlib.util
import json
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import rwkv_es
from rwkv_es.errors import ConfigError, TaskError

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is a text that scores 1.0; `meta` is for the scorer."""

    prompt: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Task:
    """What a task folder defines. `problems` takes a split; `reward` takes a problem and opening + completion."""

    name: str
    problems: Callable[[str], Sequence[Problem]]
    reward: Callable[[Problem, str], float | None]
    version: str
    stop: tuple[str, ...]
    max_new: int
    template: str


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


_TURN = "User: {q}\n\nAssistant:"
TEMPLATES: dict[str, Template] = {
    "chat": Template(_TURN),
    "think": Template(_TURN, " <think"),  # without ">": "<think>" would be other tokens than the model was trained on
    "short_think": Template(_TURN, " <think>\n</think"),
    "assistant_think": Template(  # EGGROLL's prompt for Countdown and AIME, as published
        "User: You are a helpful assistant. You first think about the reasoning process in your mind and then "
        "provide the user with the answer. Question: {q}. Assistant:",
        " <think",
    ),
    "raw": Template("{q}"),
}


def render(template: str, question: str) -> str:
    """Return the prompt to send; blank lines inside the question are closed up (not for "raw").

    Raises:
        ConfigError: unknown template.
    """
    before, start = _template(template)
    if template != "raw":
        question = re.sub(r"\n{2,}", "\n", question).strip()
    return before.replace("{q}", question) + start


def opening(template: str) -> str:
    """Return the start of the model's answer that the prompt already holds, and that is scored with it.

    Raises:
        ConfigError: unknown template.
    """
    return _template(template).opening


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(f"unknown template {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def list_tasks() -> dict[str, str]:
    """Return the built-in tasks: name -> first line of the docstring of its task.py."""
    files = sorted(_root().glob("*/task.py"))
    return {file.parent.name: _first_line(file) for file in files}


def load_task(name_or_path: str, data: str = "") -> Task:
    """Load a built-in task by its folder's name, or the user's own from a folder with task.py or a .py file.

    Raises:
        TaskError: no such task, it cannot be imported, or something is missing in it.
    """
    is_path = name_or_path.endswith(".py") or any(mark in name_or_path for mark in "/\\.~")
    module, name = _import_path(name_or_path) if is_path else (_import_built_in(name_or_path), name_or_path)
    problems, reward = _member(module, "problems", name_or_path), _member(module, "reward", name_or_path)
    if not (callable(problems) and callable(reward)):
        raise TaskError(f"problems and reward of task {name_or_path} must be functions")
    return Task(name, lru_cache(_checked(problems, name_or_path, data)), reward, **_constants(module, name_or_path))


def read_problems(
    data: str, split: str, fields: Mapping[str, type], make: Callable[[Mapping[str, Any]], Problem]
) -> list[Problem]:
    """Read a JSONL file (for every split), or {split}.jsonl in a folder; either may be compressed (.gz).

    `make` turns a row, which has all `fields` in their types, into a problem; its ValueError names the line.

    Raises:
        TaskError: unreadable, no problems, or a bad line.
    """
    file = _data_file(data, split)
    open_file: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with open_file(file, "rb") as lines:  # of bytes: they end at b"\n" alone, never at U+2028
            numbered = [(f"{file}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"the data file {file} cannot be read: {error}") from None
    if not numbered:
        raise TaskError(f"the data file {file} holds no problems; it needs one JSON object a line")
    return [_read_row(where, line, fields, make) for where, line in numbered]


def _data_file(data: str, split: str) -> Path:
    path = Path(data).expanduser()
    if path.is_file():
        return path
    candidates = [path / f"{split}.jsonl", path / f"{split}.jsonl.gz"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    wanted = f"has neither {split}.jsonl nor {split}.jsonl.gz" if path.is_dir() else "does not exist"
    raise TaskError(f"the data path {data} {wanted}; give a JSONL file or a folder with one for each split")


def _read_row(where: str, line: bytes, fields: Mapping[str, type], make: Callable[[Any], Problem]) -> Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise TaskError(f"{where} must be a JSON object; got {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise TaskError(f"{where} has no field {name!r}; it needs {', '.join(fields)}")
        if not isinstance(row[name], kind):
            raise TaskError(f"{where}: field {name!r} must be {kind.__name__}; got {type(row[name]).__name__}")
    try:
        return make(row)
    except ValueError as error:
        raise TaskError(f"{where}: {error}") from None


def _root() -> Path:
    """Return the folder of the built-in tasks: inside the package in a wheel, beside it in a working tree."""
    inside = Path(__file__).parent / "tasks"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "tasks"


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def _import_built_in(name: str) -> ModuleType:
    if not (_root() / name / "task.py").is_file():
        names = list(list_tasks())
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"built-in tasks: {', '.join(names)}"
        own = f" Your own folder is loaded as ./{name}." if Path(name).exists() else ""
        raise TaskError(f"unknown task {name!r}; {hint}{own}")
    if "rwkv_es.tasks" not in sys.modules:
        package = ModuleType("rwkv_es.tasks")
        package.__path__ = [str(_root())]
        sys.modules["rwkv_es.tasks"] = rwkv_es.tasks = package  # type: ignore[attr-defined]
    return _run_import(name, lambda: importlib.import_module(f"rwkv_es.tasks.{name}.task"))


def _import_path(spec: str) -> tuple[ModuleType, str]:
    """Import the user's file as a package of its own, so that it can import its neighbours relatively."""
    path = Path(spec).expanduser().resolve()
    file = path / "task.py" if path.is_dir() else path
    if not file.is_file():
        raise TaskError(f"task {spec}: there is no file {file}; give a folder with task.py, or a .py file")
    unique = f"rwkv_es_task_{sha256(str(file).encode()).hexdigest()[:16]}"
    found = importlib.util.spec_from_file_location(unique, file, submodule_search_locations=[str(file.parent)])
    if found is None or found.loader is None:
        raise TaskError(f"task {spec}: {file.name} is not a Python file; its name must end in .py")
    module, loader = importlib.util.module_from_spec(found), found.loader
    sys.modules[unique] = module
    _run_import(spec, lambda: loader.exec_module(module))
    return module, file.parent.name if file.name == "task.py" else file.stem


def _run_import(spec: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        raise TaskError(f"task {spec} cannot be imported: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


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
    if not (isinstance(stop, (tuple, list)) and all(isinstance(string, str) and string for string in stop)):
        raise TaskError(f"STOP of task {spec} must be a tuple of strings, none of them empty; got {stop!r}")
    if not (isinstance(max_new, int) and max_new > 0):
        raise TaskError(f"MAX_NEW of task {spec} must be a whole number of tokens above 0; got {max_new!r}")
    if template not in list(TEMPLATES):  # a list: what was given may not be hashable
        raise TaskError(f"TEMPLATE of task {spec} must be one of {', '.join(TEMPLATES)}; got {template!r}")
    return {"version": version, "stop": tuple(stop), "max_new": max_new, "template": template}


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
            raise TaskError(f"problems({split!r}) of task {spec} failed: {_one_line(error)}") from error
        if not is_usable:
            raise TaskError(
                f"problems({split!r}) of task {spec} must return a sequence of Problem, and not an empty one"
            )
        return found

    return of_split
