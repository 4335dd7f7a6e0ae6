"""EGGROLL (arXiv 2511.16652) in the normalisation of its official code, on our engine.

Rewards are centred per problem and divided by the deviation of all rewards, between problems too; the step is
lr_scale * sigma * sqrt(F) times the mean over the F answers, so that with fitness of unit variance an entry moves by
lr_scale * sigma. The head is perturbed like every other matrix.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from rwkv_es import ES
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .rates import falling
from .world import Answered, Asked

GRID = [{"sigma": sigma, "lr_scale": 0.5} for sigma in (1e-2, 2e-2)]
GRID += [{"sigma": 2e-2, "lr_scale": scale, "prompts": 32} for scale in (0.3, 1.0)]
GRID += [{"sigma": sigma, "lr_scale": 0.4, "prompts": 32, "schedule": "cosine"} for sigma in (1e-2, 2e-2)]
GRID += [
    {"sigma": 2e-2, "lr_scale": 0.4, "population": n, "prompts": 2048 // n, "schedule": "cosine"} for n in (256, 512)
]
DEFAULTS: Mapping[str, Any] = {"population": 64, "prompts": 8, "targets": {"matrices": 1.0, "head.weight": 1.0}}


class State(NamedTuple):
    """The strategy; it takes the fitness as it is."""

    es: ES
    settings: Mapping[str, Any]


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base; the model's weights move in place."""
    own = model._replace(params={name: tensor.clone() for name, tensor in model.params.items()})
    sigma, population = settings["sigma"], settings["population"]
    es = ES(own, population=population, sigma=sigma, targets=settings["targets"], seed=seed, fitness="raw")
    return State(es, settings)


def ask(state: State) -> Asked:
    """Try the step's members."""
    return Asked(members=state.es.ask(), model=state.es.model)


def tell(state: State, answered: Answered) -> State:
    """Move by lr_scale * sigma * sqrt(F) / F * sum of fitness * noise."""
    es, num_members = state.es, len(answered.rewards)
    lr_scale = state.settings["lr_scale"] * falling(state.settings, answered.spent)
    es.first_lr = lr_scale * es.sigma * math.sqrt(num_members)
    es.tell(official_fitness(answered.rewards)[:, None])
    return state


def params(state: State) -> Params:
    """Return the weights."""
    return state.es.model.params


def official_fitness(rewards: Tensor) -> Tensor:
    """Return (N,) whose sum over members times noise is that of all N*P answers: rewards (N,P).

    F = N*P answers, each with noise of its own in the official code; here P of them share it, so that their sum over
    the problems has the variance of P: sqrt(F)/F * sum over P = sqrt(N)/N * (sum over P) / sqrt(P).
    """
    deviations = rewards - rewards.mean(0)
    return deviations.sum(1) / (rewards.var(correction=0) + 1e-5).sqrt() / math.sqrt(rewards.shape[1])
