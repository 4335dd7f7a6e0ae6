"""ES at Scale (Qiu et al., arXiv 2509.24372): 30 members, full noise from seeds, z-scores, lr = sigma / 2, plain steps.

One member exists at a time: its noise is drawn again for the update, so that memory is that of inference.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .rates import falling
from .vectors import NORMS, Space, normal, params_at, space_of
from .world import Answered, Asked

GRID = [{"sigma": sigma, "head": 10} for sigma in (3e-3, 1e-2, 3e-2)]
GRID += [{"sigma": 3e-2, "head": 1}, {"sigma": 1e-2, "head": 10, "prompts": 32}]
GRID += [{"sigma": 3e-2, "head": 10, "schedule": "cosine"}]
GRID += [{"sigma": sigma, "names": NORMS} for sigma in (0.03, 0.1)]
DEFAULTS: Mapping[str, Any] = {"population": 30, "prompts": 16}


class State(NamedTuple):
    """The mean, and how many steps were taken."""

    space: Space
    settings: Mapping[str, Any]
    seed: int
    mean: Tensor  # (D,)
    step: int = 0


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base."""
    space = space_of(model.params, settings)
    return State(space, settings, seed, torch.zeros_like(space.origin))


def ask(state: State) -> Asked:
    """Try one member after the other."""
    sigma = state.settings["sigma"]
    points = (state.mean + sigma * _noise(state, n) for n in range(state.settings["population"]))
    return Asked(candidates=(params_at(state.space, z) for z in points))


def tell(state: State, answered: Answered) -> State:
    """Add lr / N * sum of z-score * noise."""
    rewards = answered.rewards.mean(1)
    scores = ((rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)).tolist()
    lr, mean = state.settings["sigma"] / 2 * falling(state.settings, answered.spent), state.mean.clone()
    for n, score in enumerate(scores):
        mean.add_(_noise(state, n), alpha=lr / len(scores) * score)
    return state._replace(mean=mean, step=state.step + 1)


def params(state: State) -> Params:
    """Return the mean's weights."""
    return params_at(state.space, state.mean)


def _noise(state: State, member: int) -> Tensor:
    step = state.step * state.settings["population"] + member
    return normal(state.seed, step, (len(state.mean),))
