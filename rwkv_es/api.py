"""For programs of one's own: training, evaluation and tasks from Python objects, beside the ES and the token loop.

Nothing here changes global state: no thread counts, no search path, no signal handlers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rwkv_es.config.file import is_run_folder
from rwkv_es.config.options import OPTIONS, Config, build
from rwkv_es.es.strategy import ES
from rwkv_es.reward.adapters import Answer, Scorer, of_own, scorer_of
from rwkv_es.run.weights import weights_of
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.sets import with_sets
from rwkv_es.task.task import Problem, Task
from rwkv_es.verbs import evaluate as evaluation
from rwkv_es.verbs import export as exporting
from rwkv_es.verbs import train as training

Reward = Callable[..., Any]  # of any form that `--reward` takes: f(problem, text), f(completion, answer), TRL's, verl's


def load_task(
    source: str | Sequence[Problem],
    reward: Reward | None = None,
    *,
    data: str = "",
    held_out: Sequence[Problem] = (),
    name: str = "own",
    template: str = "raw",
    stop: Sequence[str] = (),
    stop_included: Sequence[str] = (),
    max_new_tokens: int = 256,
) -> Task:
    """Load a task by name, folder or file, as `--task` does; or make one from problems and a reward.

    A completion of such a task ends before a `stop` string, after one of `stop_included`, or after `max_new_tokens`.

    Raises:
        TaskError: it cannot be loaded.
        ConfigError: problems without a reward, or none at all.
    """
    if isinstance(source, str):
        return load_tasks(source, data)
    if reward is None or not source:
        raise ConfigError("a task from a list needs problems and a reward: load_task([Problem(...), ...], reward)")
    splits = {"train": list(source), "test": list(held_out)}
    task = Task(name, splits.__getitem__, _unset, "1", tuple(stop), max_new_tokens, template, tuple(stop_included))
    return _with_reward(task, reward)


def train(model: str = "tiny", task: str | Task = "countdown_mini", reward: str | Reward = "", **options: Any) -> Path:
    """Train as `rwkv-es train` does, with the same options by name. Returns the run's folder.

    A reward that is a function scores in this process, at the end of each step and without a time limit; named as text
    ("file.py:function") it scores in worker processes that are killed when they hang.

    Raises:
        RwkvEsError: an option is unknown, or something cannot be loaded, written or scored.
    """
    if isinstance(task, Task) and not task.problems("test"):
        options.setdefault("eval_every", 0)
    config, own_task, scorer = _prepared(model, task, reward, options, "train")
    folder = training.train(config, own_task, scorer)
    assert folder is not None, "a program of one process writes its run"
    return folder


def evaluate(
    model: str = "tiny", task: str | Task = "countdown_mini", reward: str | Reward = "", **options: Any
) -> dict[str, Any]:
    """Score a model's answers as `rwkv-es eval` does; return its metrics, each with a 95 % confidence interval.

    Raises:
        RwkvEsError: an option is unknown, or something cannot be loaded or scored.
    """
    config, own_task, scorer = _prepared(model, task, reward, options, "eval")
    return evaluation.judged(config, own_task, scorer)[1]


def export(weights: ES | str | Path, out: str | Path = "") -> Path:
    """Write the weights of an `ES`, or the best ones of a run, laid out exactly like the base. Returns the file.

    Raises:
        RwkvEsError: there is nothing to write, or the file exists or cannot be written.
    """
    if not isinstance(weights, ES):
        return exporting.export(Config(run=str(weights), out=str(out)))
    source = weights.model.source
    if source is None:
        raise ConfigError("the model was not loaded from a file, so there is no layout to export to; use load_model")
    was_rounded = weights.model.like.dtype == torch.bfloat16
    return exporting.export_params(weights.weights(), source, Path(out), was_rounded=was_rounded)[0]


def _prepared(
    model: str, task: str | Task, reward: str | Reward, options: dict[str, Any], verb: str
) -> tuple[Config, Task | None, Scorer | None]:
    """Return the options, and what of them is a Python object."""
    own_task = task if isinstance(task, Task) else None
    named = own_task.name if own_task is not None else str(task)
    values = {"model": model, "task": named, "reward": reward if isinstance(reward, str) else "", **options}
    if is_run_folder(model):
        values.update(weights_of(Path(model), values, takes_state="state" in OPTIONS[verb]))
    config = build(values, verb)
    if isinstance(reward, str) and own_task is None:
        return config, None, None
    if isinstance(reward, str) and reward:
        raise ConfigError(f"a task that is a Python object takes a reward that is a function; got {reward!r}")
    own_task = with_sets(own_task, config.eval_sets, {own_task.name: ""}) if own_task is not None else None
    full = own_task if own_task is not None else load_tasks(config.task, config.data, config.eval_sets)
    function = full.reward if isinstance(reward, str) else reward
    return config, full, of_own(scorer_of(function, full, "task" if isinstance(reward, str) else "auto"), full)


def _with_reward(task: Task, reward: Reward) -> Task:
    """Return the task with a function of any form as its own reward."""
    scorer = scorer_of(reward, task)

    def score(problem: Problem, text: str) -> Any:
        return scorer.score([Answer(problem, text)])[0].value

    return replace(task, reward=score)


def _unset(problem: Problem, text: str) -> float:
    raise AssertionError("replaced before anybody calls it")
