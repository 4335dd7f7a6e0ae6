"""Check the evolution strategies of compare/ from outside: evosax's of the same name, on functions.

    pip install -e '.[compare,outside]'
    python scripts/compare_evosax.py

Both have the same settings, start and number of evaluations; the table has the medians over the seeds of the value that
each reaches (of its mean, or of a population's best), and the p of the rank-sum test: small where they differ.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import evosax.algorithms as evosax
import jax
import numpy as np
import optax
import torch
from compare.methods import METHODS
from compare.world import Answered, Asked
from evosax.core.fitness_shaping import standardize_fitness_shaping_fn

from rwkv_es.model.forward import Model

SHIFT = 0.7  # the start is 0, the optimum of the sphere and of Rastrigin's function this in every entry
NAME = "ln_out.weight"  # a vector: its noise is full, so that ours and EGGROLL are plain evolution strategies
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # (N,D) -> (N,)
    "sphere": lambda x: ((x - SHIFT) ** 2).sum(1),
    "rosenbrock": lambda x: (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1),
    "rastrigin": lambda x: (10 + (x - SHIFT) ** 2 - 10 * np.cos(2 * math.pi * (x - SHIFT))).sum(1),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {"population": 64, "sigma": 0.1, "lr": 0.05, "targets": {NAME: 1.0}},
    "eggroll": {"population": 64, "sigma": 0.1, "lr_scale": 1 / 16, "targets": {NAME: 1.0}},
    "openai_es": {"population": 64, "sigma": 0.1, "lr": 0.02},
    "genetic": {"population": 32, "sigma": 0.05, "parents": 8},
    "cma_es": {"population": 32, "sigma": 0.3},
    "sep_cma": {"population": 32, "sigma": 0.3},
    "random_search": {"population": 32, "sigma": 0.3},
}


class Case(NamedTuple):
    """A function of D entries, and how long it is minimised."""

    function: str
    size: int
    steps: int

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the values (N,) at points (N,D)."""
        return FUNCTIONS[self.function](points.astype(np.float64))


def by_ours(method: str, case: Case, seed: int) -> float:
    """Return the value that the method of compare/ reaches."""
    module = METHODS[method]
    settings = {**module.DEFAULTS, "names": ("*",), **SETTINGS[method]}
    state = module.start(Model({NAME: torch.zeros(case.size)}, None), settings, seed)
    for step in range(case.steps):
        rewards = -torch.from_numpy(case(np.stack(list(_points(module.ask(state), settings)))))
        state = module.tell(state, Answered(rewards[:, None], spent=step / case.steps))
    return float(case(module.params(state)[NAME].numpy()[None])[0])


def _points(asked: Asked, settings: Mapping[str, Any]) -> Iterator[np.ndarray]:
    if asked.model is None:
        yield from (params[NAME].numpy() for params in asked.candidates)
        return
    for noise in asked.members.factors.a[NAME].flatten(1):
        yield from ((asked.model.params[NAME] + sign * settings["sigma"] * noise).numpy() for sign in (1, -1))


def by_evosax(method: str, case: Case, seed: int) -> float:
    """Return the value that evosax's reaches."""
    algorithm = _algorithm(method, case.size)
    key, params = jax.random.key(seed), algorithm.default_params
    start = np.zeros(case.size, np.float32)
    if isinstance(algorithm, evosax.SimpleGA):
        population = np.zeros((algorithm.population_size, case.size), np.float32)
        state = algorithm.init(key, population, case(population), params)
    else:
        if hasattr(params, "std_init"):
            params = params.replace(std_init=SETTINGS[method]["sigma"])
        state = algorithm.init(key, start, params)
    for _ in range(case.steps):
        key, asking, telling = jax.random.split(key, 3)
        population, state = algorithm.ask(asking, state, params)
        state, _ = algorithm.tell(telling, population, case(np.asarray(population)), state, params)
    is_genetic = isinstance(algorithm, evosax.SimpleGA)
    reached = algorithm.get_best_solution(state) if is_genetic else algorithm.get_mean(state)
    return float(case(np.asarray(reached)[None])[0])


@cache
def _algorithm(method: str, size: int) -> Any:
    """Make evosax's form of a method; compiled once for all seeds."""
    settings, solution = SETTINGS[method], np.zeros(size, np.float32)
    population, sigma = settings["population"], settings["sigma"]
    schedule = optax.constant_schedule(sigma)
    if method == "openai_es":
        return evosax.Open_ES(population, solution, optimizer=optax.adam(settings["lr"]), std_schedule=schedule)
    if method in ("ours", "eggroll"):  # theirs: lr / (N sigma) * sum of fitness * noise
        lr = settings["lr"] if method == "ours" else settings["lr_scale"] * sigma * math.sqrt(population)
        shaping = standardize_fitness_shaping_fn
        rule = optax.sgd(lr * sigma)
        return evosax.Open_ES(population, solution, optimizer=rule, std_schedule=schedule, fitness_shaping_fn=shaping)
    if method == "genetic":
        algorithm = evosax.SimpleGA(population, solution, std_schedule=schedule)
        algorithm.elite_ratio = settings["parents"] / population
        return algorithm
    if method == "random_search":
        return evosax.RandomSearch(
            population, solution, sampling_fn=lambda key: sigma * jax.random.normal(key, (size,))
        )
    return {"cma_es": evosax.CMA_ES, "sep_cma": evosax.Sep_CMA_ES}[method](population, solution)


def rank_sum_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the two-sided p of Wilcoxon's rank-sum test, by its normal approximation."""
    wins = sum((a < b) + (a == b) / 2 for a in ours for b in theirs)
    n, m = len(ours), len(theirs)
    return math.erfc(abs(wins - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12) / math.sqrt(2))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), help="methods")
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS), help="functions")
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 30], help="entries")
    parser.add_argument("--steps", type=int, default=300, help="steps of a run")
    parser.add_argument("--seeds", type=int, default=15, help="runs of each")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("| method | function | entries | of compare/ | evosax | p |\n|---|---|---|---|---|---|")
    for method in options.methods:
        for case in (Case(name, size, options.steps) for name in options.functions for size in options.sizes):
            ours, theirs = ([by(method, case, s) for s in range(options.seeds)] for by in (by_ours, by_evosax))
            values = f"{median(ours):.3g} | {median(theirs):.3g} | {rank_sum_p(ours, theirs):.2g}"
            print(f"| {method} | {case.function} | {case.size} | {values} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
