"""The weights as a function of base, options and ledger: what moves them, and how they are built again."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.options import Config
from rwkv_es.errors import CheckpointError
from rwkv_es.es.update import Rule, Updater, checksum
from rwkv_es.model.checkpoint import Params
from rwkv_es.model.forward import Model, with_initial_state
from rwkv_es.noise.factors import Noise, select


class Step(NamedTuple):
    """One training step, as exact as it was computed."""

    step: int  # from 0
    rewards: list[list[float | None]]  # (N,P), None: missing
    fitness: list[float]  # (N,)
    sigma: float
    lr: float
    tokens: int
    seconds: float
    checksum: str  # of the weights after the step


class Trainee(NamedTuple):
    """A model whose weights move, and the noise that moves them."""

    model: Model
    noise: Noise
    updater: Updater


def trainee(config: Config, model: Model, base: Params) -> Trainee:
    """Return the model as it is trained, its noise, and what moves it."""
    model, noise = perturbable(config, model)
    rule = Rule(config.optimizer, config.momentum, config.weight_decay, config.master, config.seed)
    return Trainee(model, noise, Updater(model, list(noise.targets), rule, base))


def perturbable(config: Config, model: Model) -> tuple[Model, Noise]:
    """Return the model as it is perturbed (with an initial state where that is a target) and its noise."""
    if any(key == "state" or "time_state" in key for key in config.targets):
        model = with_initial_state(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    return model, Noise(config.seed, select(shapes, config.targets, config.rank))


def move_(trainee: Trainee, step: int, fitness: Tensor, sigma: float, lr: float) -> dict[str, float]:
    """Apply one ES update in place; without any signal there is none. Returns the step's size in units of sigma."""
    if not fitness.any():
        return {"step_rms_per_sigma": 0.0}
    rms_per_sigma = trainee.updater.step_(trainee.noise.at(step, sigma), fitness, lr)
    return {"step_rms_per_sigma": sum(rms_per_sigma.values()) / len(rms_per_sigma)}


def rebuild_(trainee: Trainee, steps: Sequence[Step]) -> Iterator[Step]:
    """Take recorded steps again, in place; yield each one taken.

    Raises:
        CheckpointError: the weights after a step are not those that the ledger speaks of. It is looked at after each
            step, before that is yielded.
    """
    for step in steps:
        move_(trainee, step.step, torch.tensor(step.fitness, dtype=torch.float64), step.sigma, step.lr)
        found = checksum(trainee.updater.weights())
        if found != step.checksum:
            raise CheckpointError(
                f"the weights rebuilt for step {step.step} have the checksum {found}, not {step.checksum} as in the "
                "ledger; the base checkpoint, a snapshot or the ledger was changed, or the device is another"
            )
        yield step


def as_rewards(step: Step) -> Tensor:
    """Return a recorded step's rewards (N,P) float64, NaN where they are missing."""
    rows = [[float("nan") if reward is None else reward for reward in row] for row in step.rewards]
    return torch.tensor(rows, dtype=torch.float64)
