"""Random search: Gaussian points around the base; the best point so far is kept."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .vectors import NORMS, Space, normal, params_at, space_of
from .world import Answered, Asked

GRID = [{"sigma": sigma, "head": 10} for sigma in (3e-3, 1e-2, 3e-2)]
GRID += [{"sigma": sigma, "head": 1} for sigma in (1e-2, 3e-2)]
GRID += [{"sigma": 1e-2, "head": 10, "prompts": 32}]
GRID += [{"sigma": sigma, "names": NORMS} for sigma in (0.03, 0.1)]
DEFAULTS: Mapping[str, Any] = {"population": 32, "prompts": 16}


class State(NamedTuple):
    """The best point so far, and the points that are being tried, of which it is the first."""

    space: Space
    settings: Mapping[str, Any]
    seed: int
    best: Tensor
    step: int = 0


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base."""
    space = space_of(model.params, settings)
    return State(space, settings, seed, torch.zeros_like(space.origin))


def ask(state: State) -> Asked:
    """Try the best point again, so that all are judged on the same problems, and new ones."""
    return Asked(candidates=(params_at(state.space, z) for z in _tried(state)))


def tell(state: State, answered: Answered) -> State:
    """Keep the point with the highest mean reward; a tie changes nothing."""
    best = _tried(state)[int(answered.rewards.mean(1).argmax())]
    return state._replace(best=best.clone(), step=state.step + 1)


def params(state: State) -> Params:
    """Return the best point's weights."""
    return params_at(state.space, state.best)


def _tried(state: State) -> Tensor:
    shape = (state.settings["population"] - 1, len(state.best))
    return torch.cat((state.best[None], state.settings["sigma"] * normal(state.seed, state.step, shape)))
