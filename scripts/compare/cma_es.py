"""CMA-ES and its diagonal form, by the package `cma` (Hansen): the first on a few entries, the second on all.

A full covariance of D entries has D * D numbers of eight bytes: `bytes_of_covariance`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import cma
import numpy as np
import torch

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .vectors import FEW, NORMS, Space, params_at, space_of
from .world import Answered, Asked

GRID = [{"sigma": sigma, "names": FEW} for sigma in (0.1, 0.3, 1.0)]
GRID += [{"sigma": sigma, "names": NORMS} for sigma in (0.03, 0.1, 0.2)]
GRID += [{"sigma": 0.3, "names": FEW, "prompts": 32}]
GRID += [{"sigma": 0.1, "names": NORMS, "prompts": 32}]
DEFAULTS: Mapping[str, Any] = {"population": 32, "prompts": 16}


class State(NamedTuple):
    """The package's strategy, which minimises, and the points that it has asked for."""

    space: Space
    strategy: Any
    points: list[np.ndarray]


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base."""
    space = space_of(model.params, settings)
    options = {"popsize": settings["population"], "seed": seed + 1, "verbose": -9}  # 0 would be the clock
    options |= {"CMA_diagonal": True} if settings.get("diagonal") else {}
    strategy = cma.CMAEvolutionStrategy(np.zeros(len(space.origin)), settings["sigma"], options)
    return State(space, strategy, strategy.ask())


def ask(state: State) -> Asked:
    """Try the strategy's points."""
    return Asked(candidates=(params_at(state.space, torch.from_numpy(z).float()) for z in state.points))


def tell(state: State, answered: Answered) -> State:
    """Tell the strategy, and let it ask for the next points."""
    state.strategy.tell(state.points, (-answered.rewards.mean(1)).tolist())
    return state._replace(points=state.strategy.ask())


def params(state: State) -> Params:
    """Return the mean's weights."""
    return params_at(state.space, torch.from_numpy(state.strategy.mean).float())


def bytes_of_covariance(num_entries: int) -> int:
    """Return what a full covariance takes in fp64."""
    return 8 * num_entries**2
