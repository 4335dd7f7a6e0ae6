"""What makes a run the same run: the content of its base, data and rewards, and the options its weights follow from."""

import hashlib
import importlib.util
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rwkv_es import __version__
from rwkv_es.config.file import parse_yaml
from rwkv_es.config.option import default_of
from rwkv_es.config.options import FIELDS, PROVENANCE, Config, with_todays_names
from rwkv_es.pretrained.tokenizer import Tokenizer
from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.task import Generated, Problem, Task

# Options that may differ when a run continues: they change what is watched or how fast, never the weights.
FREE = {name for name, f in FIELDS.items() if f.metadata["on_resume"] == "free"}
# What the weights of past steps are a function of, besides the base and the ledger: a fork may change all others.
LASTING = {name for name, f in FIELDS.items() if f.metadata["on_resume"] == "same"} | {"base_sha256"}
BY_CONTENT = {"model", "data", "tokenizer", "reward"}  # paths: what they hold counts, not where it is
_WITH_PATHS = {"task", "shots", "run", "eval_sets"}
FORKED_AT = "forked_at"  # key under PROVENANCE: how many steps a fork has taken over
ENGINE_DTYPE = "engine_dtype"  # the same: what the base was rounded to when the run began
BEST_SINCE = "best_since"  # the same: the step from which on held-out scores can be compared
CONTENTS = {
    **{"problems_sha256": "the task's problems", "reward_sha256": "the reward", "task_sha256": "the task's code"},
    **{"shots_sha256": "the shots", "tokenizer_sha256": "the tokenizer"},
}
_FEW = 64  # problems looked at of a task that makes them when asked for


def contents(config: Config, task: Task, tokenizer: Tokenizer) -> dict[str, str]:
    """Return digests of what a run learns from: problems, the code of its own task and rewards, shots, vocabulary."""
    parts = [part.rpartition("=")[0] or part for part in config.task.split(",")]
    own = [
        path for part in parts if (path := Path(part).expanduser()).exists() and ("/" in part or part.endswith(".py"))
    ]
    references = [part.strip() for part in config.reward.split(",") if part.strip()]
    shots = Path(config.shots).expanduser()
    return {
        "problems_sha256": _digest(_of_problems(task)),
        "task_sha256": _digest(path.read_bytes() for place in own for path in _python_files(place)) if own else "",
        "reward_sha256": _digest(map(_code_of, references)) if references else "",
        "shots_sha256": _digest([shots.read_bytes()]) if shots.is_file() else "",
        "tokenizer_sha256": _digest(tokenizer.token_bytes),
    }


def in_words(digests: Mapping[str, str]) -> dict[str, str]:
    """Return digests of contents under names for people, short."""
    return {words: digests[key][:12] or "none" for key, words in CONTENTS.items()}


def _of_problems(task: Task) -> Iterable[bytes]:
    for split in ("train", "test"):
        try:
            problems: Sequence[Problem] = task.problems(split)
        except Exception as error:  # noqa: BLE001 - a split that is not there is part of what the task is
            yield f"{split} {type(error).__name__}".encode()
            continue
        yield f"{split} {len(problems)}".encode()
        yield from _texts_of(problems)
    for name, of_set in task.sets:
        yield name.encode()
        yield from _texts_of([*of_set()])


def _texts_of(problems: Sequence[Problem]) -> Iterable[bytes]:
    for problem in problems[:_FEW] if isinstance(problems, Generated) else problems:
        yield repr((problem.prompt, problem.answer, sorted(problem.meta.items(), key=str))).encode("utf-8", "replace")


def _stable(value: Any) -> Any:
    """Return a value in a form whose repr is the same in every process: sets sorted, objects by their type."""
    if isinstance(value, Mapping):
        return sorted((str(key), _stable(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return [_stable(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_stable(part)) for part in value)
    return value if isinstance(value, (str, bytes, int, float, bool, type(None))) else type(value).__name__


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _code_of(reference: str) -> bytes:
    """Return the text of the file that a reward is loaded from, or its name where there is none to read."""
    function = reference.rpartition("=")[0] or reference
    where, _, name = function.rpartition(":" if ":" in function else ".")
    name += reference.removeprefix(function)  # its weight
    try:
        if where.endswith(".py"):
            return name.encode() + Path(where).expanduser().read_bytes()
        spec = importlib.util.find_spec(where) if where and not reference.startswith("builtin:") else None
        return name.encode() + Path(spec.origin).read_bytes() if spec and spec.origin else reference.encode()
    except Exception:  # noqa: BLE001 - finding a module runs the packages around it
        return reference.encode()


def _digest(pieces: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(len(piece).to_bytes(8, "little") + piece)
    return found.hexdigest()


def provenance(base: Path) -> dict[str, str]:
    """Return what a run is made with: versions, the base checkpoint's path and sha256."""
    from rwkv_es.pretrained import checkpoint

    return {
        "rwkv_es": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
        "base": os.path.abspath(base),  # not what a link leads to: names say something
        "base_sha256": checkpoint.sha256(base),
    }


def check_same_run(
    folder: Path, options: Mapping[str, Any], made_with: Mapping[str, Any], next_step: int
) -> tuple[dict[str, Any], list[str]]:
    """Refuse to continue a run whose weights would have become different.

    Returns what to note as its provenance, and which of its contents have changed, in words: they may, from now on.

    Raises:
        ConfigError: an option that past steps depend on has changed, or the base.
    """
    old = read_config(folder)
    past = old[PROVENANCE]
    before = {**{name: default_of(f) for name, f in FIELDS.items()}, **old, "base_sha256": past.get("base_sha256")}
    now = {**options, "base_sha256": made_with["base_sha256"]}
    names = [name for name in now if name not in FREE | BY_CONTENT]
    if options["schedule"] != "constant":
        names.append("steps")  # the learning rate of the steps already taken depends on it
    made_with = {**made_with, ENGINE_DTYPE: past.get(ENGINE_DTYPE, "")}
    if (forked_at := past.get(FORKED_AT)) is not None:
        made_with[FORKED_AT] = forked_at
        names = [name for name in names if name in LASTING or next_step > forked_at]
    differing = [name for name in names if without_folders(name, before[name]) != without_folders(name, now[name])]
    changes = [f"{name} {before[name]} (now {now[name]})" for name in differing]
    if changes:
        raise ConfigError(f"{folder} holds a run with {', '.join(changes)}; choose another --run, or give its options")
    changed = [words for key, words in CONTENTS.items() if past.get(key, made_with.get(key)) != made_with.get(key)]
    if before["eval_size"] != options["eval_size"]:
        changed.append("the number of held-out problems (eval_size)")
    if without_folders("eval_sets", before["eval_sets"]) != without_folders("eval_sets", options["eval_sets"]):
        changed.append("the evaluation sets (eval_sets)")
    made_with[BEST_SINCE] = next_step if changed else past.get(BEST_SINCE, 0)
    return made_with, changed


def without_folders(name: str, value: Any) -> Any:
    """Return an option's value without the folders of the paths in it."""
    return re.sub(r"[^,=]*/", "", value) if name in _WITH_PATHS else value


def made_by_a_run(folder: Path) -> bool:
    """Say whether a folder is a run's: its config.yaml says what it was made with."""
    try:
        values = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return bool(any(folder.glob("snapshots/step-*")))  # and the ledger is missed by name
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    return isinstance(values, dict) and isinstance(values.get(PROVENANCE), dict)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run folder's config.yaml: the options, and under `made_with` the provenance.

    Raises:
        ConfigError: the folder holds no run, or the file is damaged.
    """
    path = folder / "config.yaml"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8-sig"))
        found = {
            "steps": default_of(FIELDS["steps"]),
            **with_todays_names(values),
            PROVENANCE: dict(values[PROVENANCE]),
        }
        counts = (found["steps"], *(found[PROVENANCE].get(key) or 0 for key in (FORKED_AT, BEST_SINCE)))
        if not all(map(files.is_count, counts)):
            raise ValueError(f"{counts} are no numbers of steps")
        return found
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} holds no run (no config.yaml); name the folder of a training run") from None
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        raise ConfigError(f"{path} is damaged; restore it, or choose another --run") from None


def config_text(options: Mapping[str, Any], made_with: Mapping[str, Any]) -> str:
    """Return what config.yaml holds."""
    return yaml.safe_dump({**options, PROVENANCE: dict(made_with)}, sort_keys=False, allow_unicode=True)
