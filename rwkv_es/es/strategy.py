"""The algorithm, with ask and tell: who answers, and how the weights follow the rewards (EGGROLL, arXiv 2511.16652).

    es = ES(model, sigma=1e-3, lr=1e-3, population=256)
    members = es.ask()           # members 2j and 2j+1 see W +- sigma/sqrt(r) A_j B_j.T
    ...                          # every member answers the same P problems
    es.tell(rewards)             # (N,P) -> fitness (N,) -> W += lr/N sum_n f_n s_n A_j B_j.T / sqrt(r)

The noise of a step is made here and nowhere else, so that the members who answer and the update that follows agree.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.options import Config
from rwkv_es.es.fitness import shape
from rwkv_es.es.schedule import decay
from rwkv_es.es.step import Step as Step  # noqa: PLC0414 - callers know it by this module
from rwkv_es.es.update import Rule, Updater, checksum
from rwkv_es.model.forward import Model, draw_factors, with_initial_state
from rwkv_es.model.weights import Members
from rwkv_es.noise.factors import Noise, StepNoise
from rwkv_es.noise.targets import select
from rwkv_es.pretrained.checkpoint import Params
from rwkv_es.system.errors import CheckpointError, ConfigError

OPTIONS: tuple[str, ...] = ("population", "sigma", "lr", "rank", "targets", "seed", "fitness", "optimizer", "momentum")
OPTIONS += ("weight_decay", "master", "steps", "schedule", "schedule_end", "sigma_decay")


class Update(NamedTuple):
    """What `tell` has done."""

    step: int  # from 0
    fitness: Tensor  # (N,) float64
    sigma: float
    lr: float
    reward_mean: float
    step_rms_per_sigma: float  # how far an entry moved, in units of its noise: 0 if the rewards gave no signal


class ES:
    """Evolution strategies over a model's weights, which move in place. The options are those of `rwkv-es train`."""

    def __init__(
        self,
        model: Model,
        *,
        population: int = 256,
        sigma: float = 1e-3,
        lr: float = 1e-3,
        rank: int = 1,
        targets: Mapping[str, float] | None = None,
        seed: int = 0,
        fitness: str = "zscore",
        optimizer: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        master: str = "fp32",
        steps: int = 100,
        schedule: str = "constant",
        schedule_end: float = 0.1,
        sigma_decay: bool = False,
        base: Params | None = None,
    ) -> None:
        """Start from the model's weights at step 0.

        `targets` maps names or patterns to multipliers of sigma and lr; None: all matrices of the blocks. `steps` is
        the length that a `schedule` of lr falls over. `base` (default: the model's weights of now) is what
        `weight_decay` pulls towards.

        Raises:
            ConfigError: the population is odd, or a target matches no tensor.
        """
        if population < 2 or population % 2:
            raise ConfigError(f"population must be even (members come in mirrored pairs); got {population}")
        targets = {"matrices": 1.0} if targets is None else targets
        self.model = with_initial_state(model) if _has_state(targets) else model
        self.population, self.fitness, self.step = population, fitness, 0
        self.first_sigma, self.first_lr, self.sigma_decay = sigma, lr, sigma_decay
        self.schedule, self.schedule_end, self.steps = schedule, schedule_end, steps
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.params.items()}
        self.noise = Noise(seed, select(shapes, targets, rank))
        if base is None:
            base = {name: tensor.clone() for name, tensor in model.params.items()} if weight_decay else {}
        rule = Rule(optimizer, momentum, weight_decay, master, seed)
        self.updater = Updater(self.model, list(self.noise.targets), rule, base)

    @classmethod
    def of(cls, config: Config, model: Model, base: Params | None = None) -> "ES":
        """Make it with the options of a run."""
        return cls(model, base=base, **{name: getattr(config, name) for name in OPTIONS})

    @property
    def sigma(self) -> float:
        """The noise scale of the next step."""
        return self.first_sigma * (self._decay if self.sigma_decay else 1.0)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.first_lr * self._decay

    @property
    def _decay(self) -> float:
        return decay(self.schedule, self.step, self.steps, self.schedule_end)

    def ask(self, pairs: range | None = None) -> Members:
        """Return the members of the next step: all, or those of some mirrored pairs. Pure in (seed, step)."""
        pairs = range(self.population // 2) if pairs is None else pairs
        factors = draw_factors(self._noise(self.step, self.sigma), self.model, pairs)
        return Members(range(2 * pairs.start, 2 * pairs.stop), self.step, factors)

    def tell(self, rewards: Tensor | Sequence[Sequence[float]]) -> Update:
        """Move the weights along the members that did better, and go on to the next step.

        rewards (N,P), or (N,) for one problem, of all members in order; NaN: missing. Where no problem's rewards differ
        the weights stay.

        Raises:
            ConfigError: the number of members is not the population, or the update is not finite.
        """
        rewards = torch.as_tensor(rewards, dtype=torch.float64)
        if len(rewards) != self.population:
            raise ConfigError(f"tell needs the rewards of all {self.population} members; got {len(rewards)}")
        rewards = rewards.reshape(self.population, -1)
        step, sigma, lr, fitness = self.step, self.sigma, self.lr, shape(rewards, self.fitness)
        return Update(step, fitness, sigma, lr, rewards.nanmean().item(), self._move(fitness, sigma, lr))

    def replay(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Take recorded steps again, one after the other; yield each one taken.

        Raises:
            CheckpointError: the weights after a step are not those that were recorded. It is looked at after each step,
                before that is yielded.
        """
        for step in steps:
            self.step = step.step
            self._move(torch.tensor(step.fitness, dtype=torch.float64), step.sigma, step.lr)
            found = self.checksum()
            if found != step.checksum:
                raise CheckpointError(
                    f"the weights rebuilt for step {step.step} have the checksum {found}, not {step.checksum} as in "
                    "the ledger; the base checkpoint, a snapshot or the ledger was changed, or the device or its "
                    "linear algebra library differs (steps of version 0.1.0 on an Intel CPU: set MKL_CBWR=OFF)"
                )
            yield step

    def load(self, step: int, params: Params, optimizer: Mapping[str, Any]) -> None:
        """Go on from the weights and the optimiser's memory (`weights`, `optimizer_state`) after `step` steps."""
        self.updater.load(params, optimizer)
        self.step = step

    def weights(self) -> Params:
        """Return the most exact weights there are, see `Updater.weights`."""
        return self.updater.weights()

    def optimizer_state(self) -> dict[str, Any]:
        """Return what the optimiser remembers, for a snapshot."""
        return self.updater.state()

    def checksum(self) -> str:
        """Return 16 hex digits that change with any bit of the weights."""
        return checksum(*self.updater.exact())

    def distance(self) -> float:
        """Return the root mean square of W - W0 over the targets; of a base that is not known, as if it were 0."""
        return self.updater.distance()

    def _move(self, fitness: Tensor, sigma: float, lr: float) -> float:
        """Apply one update. Returns its size in units of sigma; without any signal there is none."""
        rms_per_sigma: Mapping[str, float] = {}
        if fitness.any():
            rms_per_sigma = self.updater.step(self._noise(self.step, sigma), fitness, lr)
        self.step += 1
        return sum(rms_per_sigma.values()) / max(1, len(rms_per_sigma))

    def _noise(self, step: int, sigma: float) -> StepNoise:
        return self.noise.at(step, sigma)


def _has_state(targets: Mapping[str, float]) -> bool:
    return any(key == "state" or "time_state" in key for key in targets)
