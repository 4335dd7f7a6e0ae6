"""Several tasks as one, with weights; and which problem comes when in training."""

import math
import os
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from rwkv_es.system.errors import ConfigError, TaskError
from rwkv_es.task.sets import by_part, with_sets
from rwkv_es.task.task import PART, Generated, Problem, Task, load_task

LONGEST_CYCLE = 100_000  # problems in which every part comes exactly as often as its weight says


class Named(NamedTuple):
    """One part of a mixture, as it is named in the options."""

    spec: str
    weight: float


class Mixed(Sequence[Problem]):
    """The problems of all parts, each once; in any stretch about as many of each as the weights say."""

    def __init__(self, parts: Sequence[Sequence[Problem]], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, tuple(whole_weights(weights))
        places = [(part, k) for part, problems in enumerate(parts) for k in range(len(problems))]
        self._places = sorted(places, key=lambda place: ((place[1] + 0.5) / weights[place[0]], place[0]))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._places[index]
        return [self._at(*place) for place in chosen] if isinstance(chosen, list) else self._at(*chosen)

    def draw(self, seed: int, position: int) -> Problem:
        """Return the problem at a position of training: a cycle of shuffled parts, each part in shuffled passes."""
        cycle, place = divmod(position, sum(self.weights))
        order = _shuffled(f"mixture {seed} {cycle}", self.weights)
        part = order[place]
        turn = cycle * self.weights[part] + order[:place].count(part)
        return self._at(part, _place_in_passes(seed, turn, len(self.parts[part])))

    def _at(self, part: int, k: int) -> Problem:
        problem = self.parts[part][k]
        return Problem(problem.prompt, problem.answer, {**problem.meta, PART: part})


def refuse_too_few(task: Task, prompts: int) -> None:
    """Refuse a task that has fewer training problems than a step asks.

    Raises:
        ConfigError: it has.
    """
    if (count := len(task.problems("train"))) < prompts:
        raise ConfigError(f"prompts is {prompts}, but the task has {count} training problems; try --prompts {count}")


def draw(problems: Sequence[Problem], seed: int, position: int) -> Problem:
    """Return the problem at a position of training, a pure function of (seed, position): shuffled passes over all."""
    if isinstance(problems, Mixed):
        return problems.draw(seed, position)
    return problems[_place_in_passes(seed, position, len(problems))]


def load_tasks(spec: str, data: str = "", sets: str = "") -> Task:
    """Load a task, or a mixture: `svamp=1,gsm8k=2,countdown=1`, with `svamp=FOLDER,gsm8k=FOLDER` as data.

    With evaluation sets, written `gsm8k,math=FILE`, these are what a model is judged on, see `with_sets`.

    Raises:
        TaskError: a part or set cannot be loaded, or is not written like that.
    """
    named = parse(spec)
    if named is None:
        return with_sets(load_task(spec, data), sets, {spec: data})
    sources = _sources(data, [part.spec for part in named]) if data else {}
    all_sources = {part.spec: sources.get(part.spec, "") for part in named}
    return with_sets(_mixture(spec, named, sources), sets, all_sources)


def _mixture(spec: str, named: Sequence[Named], sources: Mapping[str, str]) -> Task:
    parts = tuple(load_task(part.spec, sources.get(part.spec, "")) for part in named)
    weights = [part.weight for part in named]
    whole_weights(weights)  # refused now, not when problems are asked for

    def problems(split: str) -> Sequence[Problem]:
        return Mixed([part.problems(split) for part in parts], weights)

    return Task(
        spec,
        lru_cache(problems),
        version=",".join(part.version for part in parts),
        stop=(),
        max_new_tokens=max(part.max_new_tokens for part in parts),
        template=parts[0].template,
        **by_part(parts),
    )


def parse(spec: str) -> list[Named] | None:
    """Read `task=weight,task=weight` (a weight left out is 1); None if the spec names one task alone.

    Raises:
        TaskError: a weight is no number above 0, or a task is named twice.
    """
    if os.path.exists(spec) or not ("," in spec or "=" in spec):
        return None
    named = [_named(part) for part in spec.split(",")]
    names = [part.spec for part in named]
    if "" in names or len(set(names)) < len(names):
        raise TaskError(f"a mixture is written task=weight,task=weight with each task once; got {spec!r}")
    return named


def overlap(train: Sequence[Problem], test: Sequence[Problem]) -> int:
    """Count the test problems that are also asked in training; generated sets keep their splits apart themselves."""
    if isinstance(train, Mixed) and isinstance(test, Mixed):
        return sum(overlap(*pair) for pair in zip(train.parts, test.parts, strict=True))
    if isinstance(train, Generated):
        return 0
    asked = {problem.prompt or problem.answer for problem in train}  # a text without a question is what is read
    return sum((problem.prompt or problem.answer) in asked for problem in test)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest whole numbers in exactly the proportion of the weights, as they are written (0.1 is a tenth).

    Raises:
        TaskError: their sum is too large: some task would hardly ever be asked.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * unit) for weight in exact]
    found = [number // math.gcd(*whole) for number in whole]
    if sum(found) > LONGEST_CYCLE:
        raise TaskError(
            f"the weights {', '.join(f'{weight:g}' for weight in weights)} repeat after {sum(found)} problems only; at "
            f"most {LONGEST_CYCLE} are allowed: write smaller whole numbers, like 1 and 2 for 0.33333 and 0.66667"
        )
    return found


def _named(part: str) -> Named:
    name, equals, weight = part.strip().rpartition("=")
    try:
        found = Named(name.strip(), float(weight)) if equals else Named(weight, 1.0)
    except ValueError:
        found = Named(name, 0.0)
    if not 0 < found.weight < math.inf:
        raise TaskError(f"the weight of a task must be a number above 0, as in gsm8k=2; got {part!r}")
    return found


def _sources(data: str, names: Sequence[str]) -> dict[str, str]:
    halves = [part.partition("=") for part in data.split(",")]
    sources = {name.strip(): path.strip() for name, _, path in halves}
    for name in sources:
        if name not in names:
            raise TaskError(f"data of a mixture is written task=PATH,task=PATH, of {', '.join(names)}; got {name!r}")
    return sources


def _place_in_passes(seed: int, position: int, count: int) -> int:
    epoch, place = divmod(position, count)
    return _order(seed, epoch, count)[place]


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"problem order {seed} {epoch}").shuffle(order)
    return order


@lru_cache(maxsize=16)
def _shuffled(key: str, weights: tuple[int, ...]) -> list[int]:
    ends = list(accumulate(weights))
    order = [next(part for part, end in enumerate(ends) if k < end) for k in range(ends[-1])]
    random.Random(key).shuffle(order)
    return order
