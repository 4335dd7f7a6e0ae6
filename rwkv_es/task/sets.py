"""Evaluation sets: what a model is judged on, where that is not its own task's held-out problems."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import TaskError
from rwkv_es.task.division import Side
from rwkv_es.task.task import PART, EvaluationSet, Generated, Problem, Task, load_task


def with_sets(task: Task, sets: str, sources: Mapping[str, str]) -> Task:
    """Return the task with evaluation sets, written `task,task=DATA`; their tasks are further parts of it.

    sources: the task's own parts and their data; a set of one of them that names no data has the same. Data without
    splits are asked whole, but for those that are trained on: of these what is held out.

    Raises:
        TaskError: a set cannot be loaded, or two of them would be called the same.
    """
    if not sets:
        return task
    named = [(spec.strip(), data.strip()) for spec, _, data in (part.partition("=") for part in sets.split(","))]
    named = [(spec, data or sources.get(spec, "")) for spec, data in named]
    own, added = task.parts or (task,), [load_task(*each) for each in named]
    trained_on = {_place(data) for data in sources.values()}
    problems = [
        _problems_of(len(own) + i, part, is_trained_on=_place(data) in trained_on)
        for i, (part, (_, data)) in enumerate(zip(added, named))
    ]
    found = tuple(map(EvaluationSet, _names(added, [data for _, data in named]), problems))
    foreign = frozenset(len(own) + i for i, (spec, _) in enumerate(named) if spec not in sources)
    return replace(task, **by_part((*own, *added)), sets=found, foreign=foreign)


def by_part(parts: tuple[Task, ...]) -> dict[str, Any]:
    """Return what a task of several parts leaves to the part that a problem belongs to, as arguments of `Task`."""

    def reward(problem: Problem, text: str) -> float | None:
        return parts[problem.meta.get(PART, 0)].reward(problem, text)

    def environment(problem: Problem) -> Any:
        found = parts[problem.meta.get(PART, 0)].environment
        assert found is not None, "asked for problems of such tasks only"
        return found(problem)

    return {
        "reward": reward,
        "environment": environment if any(part.environment for part in parts) else None,
        "timeout_s": min(part.timeout_s for part in parts),
        "parts": parts,
    }


def _problems_of(place: int, task: Task, *, is_trained_on: bool) -> Callable[[], Sequence[Problem]]:
    def problems() -> Sequence[Problem]:
        found = task.problems("test")
        asked = found.whole if isinstance(found, Side) and not is_trained_on else found
        return Generated(lambda i: replace(asked[i], meta={**asked[i].meta, PART: place}), len(asked))

    return lru_cache(problems)


def _names(tasks: Sequence[Task], data: Sequence[str]) -> list[str]:
    """Call sets by their tasks; several of one task by their data."""
    names = [task.name for task in tasks]
    found = [name if names.count(name) == 1 else Path(path).name.partition(".")[0] for name, path in zip(names, data)]
    if twice := [name for name in found if not name or found.count(name) > 1]:
        raise TaskError(
            f"two evaluation sets would be called {twice[0]!r}; name other files, as in jsonl=a.jsonl,jsonl=b.jsonl"
        )
    return [name.replace(":", "-") for name in found]


def _place(data: str) -> str:
    return os.path.realpath(os.path.expanduser(data)) if data else ""
