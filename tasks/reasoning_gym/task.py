"""Reasoning Gym: reasoning_gym:NAME is any generator of that package (pip install rwkv-es[tasks]), as chain_sum."""

import ast
import hashlib
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rwkv_es.config.option import nearest
from rwkv_es.system.errors import TaskError
from rwkv_es.system.files import replace, writing
from rwkv_es.task import Problem
from rwkv_es.task.answers import final_part, last_tagged

from .scorers import gold_of, score

VERSION = "3"
STOP = ("\n\nUser:",)
MAX_NEW_TOKENS = 1000
TEMPLATE = "think"
TIMEOUT_S = 5.0  # the package's scorers are not ours: they run where they can be killed

NUM_MADE = {"train": 2000, "test": 200}
SEEDS = {"train": 1_000_000, "test": 500_000_000}  # the package draws item i from seed + i
FORMAT = "Return the final answer in <answer> </answer> tags."


def problems(split: str, data: str = "", argument: str = "") -> Sequence[Problem]:
    """Make the items of the generator `argument` once, and read them from the cache afterwards.

    `data`: options of the generator as JSON, or a .json file of them; beside them `size` (training items) and `prompt`
    (a format of the item's question and metadata, in place of the question).
    """
    check(argument)
    options = _options(data)
    prompt = options.pop("prompt", "{question} " + FORMAT)
    size = int(options.pop("size", NUM_MADE["train"]))
    held_out = items(argument, "test", NUM_MADE["test"], options)
    if split == "test":
        return [_problem(argument, item, prompt) for item in held_out]
    asked = {item["question"] for item in held_out}
    others = [item for item in items(argument, "train", size, options) if item["question"] not in asked]
    return [_problem(argument, item, prompt) for item in others]


def reward(problem: Problem, text: str) -> float:
    """Score what stands in the last answer tag after the thinking by the generator's own rules; 0 without a tag."""
    answer = last_tagged(final_part(text))
    return 0.0 if answer is None else score(problem.meta["generator"], answer, problem.meta["item"])


def _problem(name: str, item: Mapping[str, Any], prompt: str) -> Problem:
    try:
        question = prompt.format(**{**item["metadata"], "question": item["question"]})
    except (KeyError, IndexError, ValueError) as error:
        raise TaskError(
            f"prompt {prompt!r} does not fit an item of {name} ({error}); it may name question, "
            f"{', '.join(map(str, item['metadata']))}"
        ) from None
    gold = gold_of(item)
    answer = f"<answer>{gold}</answer>" if gold else ""
    return Problem(question, answer, {"generator": name, "item": item, "ground_truth": gold})


def check(name: str) -> None:
    """Make sure that the package is there and has such a generator.

    Raises:
        TaskError: it does not.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise TaskError("task reasoning_gym needs an extra: pip install rwkv-es[tasks]")
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise TaskError(f"reasoning_gym:{name} names no generator of the package; {nearest(name, sorted(DATASETS))}")


def _options(data: str) -> dict[str, Any]:
    try:
        text = Path(data).expanduser().read_text("utf-8") if data.endswith(".json") else data
        options = json.loads(text or "{}")
    except (OSError, ValueError) as error:
        raise TaskError(f"data of reasoning_gym is JSON of options, or a .json file; got {data!r} ({error})") from None
    if not isinstance(options, dict):
        raise TaskError(f"data of reasoning_gym must be an object of options; got {data!r}")
    return options


def items(name: str, split: str, size: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return question, answer and metadata of a split's items: from the cache, where they are made at first."""
    key = hashlib.sha256(json.dumps([name, split, size, options, SEEDS[split]], sort_keys=True).encode()).hexdigest()
    folder = Path(os.environ.get("RWKV_ES_CACHE", "~/.cache/rwkv_es")).expanduser() / "reasoning_gym"
    file = folder / f"{name}-{version('reasoning-gym')}-{split}-{key[:12]}.txt"
    if not file.is_file():
        lines = [f"{item!r}\n" for item in _make(name, split, size, options)]
        with writing(file):
            folder.mkdir(parents=True, exist_ok=True)
            replace(file, "".join(lines))
    try:
        return [_item(line) for line in file.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError, SyntaxError) as error:
        raise TaskError(f"the cached items {file} cannot be read ({error}); delete the file") from None


def _item(line: str) -> dict[str, Any]:
    """Read the representation of an item without running anything; inf and nan are no literals."""
    return ast.literal_eval(_NotFinite().visit(ast.parse(line, mode="eval")))


class _NotFinite(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.copy_location(ast.Constant(float(node.id)), node) if node.id in ("inf", "nan") else node


def _make(name: str, split: str, size: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=SEEDS[split], **options)
        return [_plain({key: dataset[i][key] for key in ("question", "answer", "metadata")}) for i in range(size)]
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TaskError(f"reasoning_gym:{name} cannot be made with {dict(options)}: {reason}") from error


def _plain(value: Any) -> Any:
    """Return a value as literals, so that it can be written as text and read again without running anything."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = list if isinstance(value, list) else tuple if isinstance(value, tuple) else set
        return kind(_plain(part) for part in value)
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


if multiprocessing.parent_process() is not None and importlib.util.find_spec("reasoning_gym") is not None:
    import reasoning_gym as _loaded  # noqa: F401  a worker loads it before its first answer's time runs
