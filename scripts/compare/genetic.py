"""A genetic algorithm (Such et al., arXiv 1712.06567): truncation, mutation, one elite; no crossover."""

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
DEFAULTS: Mapping[str, Any] = {"population": 32, "parents": 8, "prompts": 16}


class State(NamedTuple):
    """The parents (T,D), the best first."""

    space: Space
    settings: Mapping[str, Any]
    seed: int
    parents: Tensor
    step: int = 0


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin with the base as the only parent."""
    space = space_of(model.params, settings)
    return State(space, settings, seed, torch.zeros(1, len(space.origin)))


def ask(state: State) -> Asked:
    """Try the elite unchanged, and mutations of parents drawn at random."""
    return Asked(candidates=(params_at(state.space, z) for z in _children(state)))


def tell(state: State, answered: Answered) -> State:
    """Let the best become parents; of equal ones the earlier, so that the elite stays until it is beaten."""
    order = answered.rewards.mean(1).argsort(descending=True, stable=True)
    parents = _children(state)[order[: state.settings["parents"]]]
    return state._replace(parents=parents, step=state.step + 1)


def params(state: State) -> Params:
    """Return the elite's weights."""
    return params_at(state.space, state.parents[0])


def _children(state: State) -> Tensor:
    count = state.settings["population"] - 1
    noise = normal(state.seed, state.step, (count, state.parents.shape[1] + 1))
    drawn = (torch.special.ndtr(noise[:, 0]) * len(state.parents)).long().clamp_max(len(state.parents) - 1)
    mutants = state.parents[drawn] + state.settings["sigma"] * noise[:, 1:]
    return torch.cat((state.parents[:1], mutants))
