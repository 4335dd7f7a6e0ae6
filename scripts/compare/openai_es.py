"""OpenAI-ES (Salimans et al., arXiv 1703.03864): full Gaussian noise held in memory, mirrored, centred ranks, Adam."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .rates import falling
from .vectors import NORMS, Space, normal, params_at, space_of
from .world import Answered, Asked

GRID = [{"sigma": sigma, "lr": lr, "head": 10} for sigma, lr in ((3e-3, 3e-4), (3e-3, 1e-3), (1e-2, 1e-3))]
GRID += [{"sigma": 1e-2, "lr": lr, "head": 1} for lr in (1e-3, 3e-3)]
GRID += [{"sigma": 1e-2, "lr": 1e-3, "head": 10, "prompts": 32}]
GRID += [{"sigma": 0.1, "lr": 3e-2, "names": NORMS}]
GRID += [{"sigma": 1e-2, "lr": 3e-3, "head": 1, "schedule": "cosine"}]
DEFAULTS: Mapping[str, Any] = {"population": 64, "prompts": 8}


class State(NamedTuple):
    """The mean, and Adam's moments, which an optimiser over the mean holds."""

    space: Space
    settings: Mapping[str, Any]
    seed: int
    mean: Tensor  # (D,)
    adam: torch.optim.Adam
    noise: Tensor  # (N/2,D) of the step
    step: int = 0


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base."""
    space = space_of(model.params, settings)
    mean = torch.zeros_like(space.origin)
    return _draw(State(space, settings, seed, mean, torch.optim.Adam([mean], lr=settings["lr"]), mean))


def ask(state: State) -> Asked:
    """Try mean + sigma * noise and mean - sigma * noise, in turns."""
    sigma = state.settings["sigma"]
    points = (state.mean + sign * sigma * noise for noise in state.noise for sign in (1, -1))
    return Asked(candidates=(params_at(state.space, z) for z in points))


def tell(state: State, answered: Answered) -> State:
    """Take Adam's step along 1/(N sigma) * sum of rank * noise."""
    utility = centred_ranks(answered.rewards.mean(1)).float()
    ascent = (utility[0::2] - utility[1::2]) @ state.noise / (len(utility) * state.settings["sigma"])
    state.mean.grad = -ascent
    state.adam.param_groups[0]["lr"] = state.settings["lr"] * falling(state.settings, answered.spent)
    state.adam.step()
    return _draw(state._replace(step=state.step + 1))


def params(state: State) -> Params:
    """Return the mean's weights."""
    return params_at(state.space, state.mean)


def centred_ranks(values: Tensor) -> Tensor:
    """Replace values (N,) by their ranks, spread over [-1/2, 1/2]; equal values share theirs."""
    below = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1) - 1
    return (below + equal / 2) / (len(values) - 1) - 0.5


def _draw(state: State) -> State:
    shape = (state.settings["population"] // 2, len(state.mean))
    return state._replace(noise=normal(state.seed, state.step, shape))
