"""The ES update: the fitness-weighted sum of the perturbations, tensor by tensor, then an optimiser's step."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.checkpoint import Params
from rwkv_es.errors import ConfigError
from rwkv_es.lowrank import weighted_sum
from rwkv_es.model import Model
from rwkv_es.noise import StepNoise, hash_key, philox

DIRECTIONS_PER_CHUNK = 64  # fixed, so that every process sums in the same order
_ENTRIES_PER_CHUNK = 1 << 20


class Rule(NamedTuple):
    """How the ES gradient becomes a step; names as in `config.Config`."""

    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    master: str = "fp32"
    seed: int = 0


def gradient(noise: StepNoise, name: str, fitness: Tensor) -> Tensor:
    """Return `g = 1/N sum_n f_n s_n A_j B_j.T / sqrt(r)`, fp32, on the device of fitness (N,).

    Shape (*batch,p,q) of the target. Mirrored members are folded first: they share A and B.
    """
    folded = (fitness[0::2] - fitness[1::2]).float()  # (N/2,)
    total: Tensor | None = None
    for start in range(0, len(folded), DIRECTIONS_PER_CHUNK):
        chunk = folded[start : start + DIRECTIONS_PER_CHUNK]
        a, b = noise.factors(name, torch.arange(start, start + len(chunk), device=chunk.device))
        part = weighted_sum(a, b, chunk)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.div_(len(fitness) * math.sqrt(noise.targets[name].rank))


class Updater:
    """Moves a model's weights in place; holds what the optimiser remembers and the fp32 master copy of bf16 weights."""

    def __init__(self, model: Model, names: Sequence[str], rule: Rule, base: Params) -> None:
        self.params, self.rule, self.base = model.params, rule, base
        is_low = model.params["emb.weight"].dtype != torch.float32
        keeps_master = is_low and rule.master == "fp32"
        self.master = {name: self.params[name].float().cpu() for name in names} if keeps_master else {}
        self.optimizers = {name: _optimizer(rule) for name in names}

    def step_(self, noise: StepNoise, fitness: Tensor, lr: float) -> dict[str, float]:
        """Apply `W += lr * multiplier * g` (or the optimiser's version of it) to every target, in place.

        fitness (N,) of all members of the step. Returns the root mean square of each target's step in units of its
        own noise scale sigma * multiplier.

        Raises:
            ConfigError: a step is not finite.
        """
        fitness = fitness.to(self.params["emb.weight"].device)
        return {name: self._step_tensor_(name, noise, fitness, lr) for name in self.optimizers}

    def weights(self) -> Params:
        """Return the most exact weights there are: master copies where they exist, all in one dtype."""
        if not self.master:
            return self.params
        return {name: self.master.get(name, w).float().cpu() for name, w in self.params.items()}

    def state(self) -> dict[str, Any]:
        """Return what the optimisers remember, for a snapshot."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items() if optimizer.state}

    def load_(self, params: Params, state: Mapping[str, Any]) -> None:
        """Continue from a snapshot's weights (in the dtype of `weights()`) and optimiser state, in place."""
        for name, weight in self.params.items():
            weight.copy_(params[name])
        for name in self.master:
            self.master[name] = params[name].clone()
        for name, saved in state.items():
            self.optimizers[name].param_groups[0]["params"][0].data = self.params[name].float()
            self.optimizers[name].load_state_dict(saved)

    def _step_tensor_(self, name: str, noise: StepNoise, fitness: Tensor, lr: float) -> float:
        multiplier = noise.targets[name].multiplier
        stored = self.params[name]
        before = self.master.get(name, stored).to(stored.device).float()
        g = gradient(noise, name, fitness).reshape(before.shape)
        after = _apply(self.optimizers[name], before, g, lr * multiplier)
        if self.rule.weight_decay:
            anchor = self.base[name].to(stored.device).float()
            after -= lr * self.rule.weight_decay * (before - anchor)
        moved = (after - before).square().mean().sqrt().item()
        if not math.isfinite(moved):
            raise ConfigError(f"the update of {name} at step {noise.step} is not finite; lower lr (now {lr})")
        self._store_(name, after, noise.step)
        return moved / (noise.sigma * multiplier)

    def _store_(self, name: str, after: Tensor, step: int) -> None:
        stored = self.params[name]
        if name in self.master:
            self.master[name].copy_(after)
        if stored.dtype == torch.bfloat16 and self.rule.master == "stochastic":
            after = round_stochastically(after, hash_key("rounding", self.rule.seed, name), step)
        stored.copy_(after)


def round_stochastically(values: Tensor, key: tuple[int, int], step: int) -> Tensor:
    """Round fp32 to a bf16 neighbour, up with a probability equal to the remainder; noise from counters.

    values (...) -> (...) bf16; right on average, so that steps below a bf16 ulp are not lost.
    """
    flat = values.contiguous().flatten()
    rounded = torch.empty_like(flat, dtype=torch.bfloat16)
    for start in range(0, len(flat), _ENTRIES_PER_CHUNK):
        bits = flat[start : start + _ENTRIES_PER_CHUNK].view(torch.int32)
        noise = _random_16_bits(start, len(bits), key, flat.new_tensor(step, dtype=torch.int64))
        shifted = ((bits.long() + noise) & ~0xFFFF).int()  # the magnitude's bits: towards or away from zero alike
        rounded[start : start + len(bits)] = shifted.view(torch.float32).bfloat16()
    return rounded.reshape(values.shape)


def _random_16_bits(start: int, count: int, key: tuple[int, int], step: Tensor) -> Tensor:
    """Return (count,) int64 below 2**16 for the entries from `start` (a multiple of 8) on."""
    blocks = torch.arange(start // 8, (start + count + 7) // 8, device=step.device)
    counter = torch.stack((blocks & 0xFFFFFFFF, blocks >> 32, step.expand_as(blocks), torch.zeros_like(blocks)), -1)
    words = philox(counter, key)  # (blocks,4)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[:count]


def _optimizer(rule: Rule) -> torch.optim.Optimizer:
    """Make a torch optimiser over one stand-in parameter; its tensor is set anew at every step."""
    stand_in = [torch.nn.Parameter(torch.empty(0))]
    if rule.optimizer == "adam":
        return torch.optim.Adam(stand_in, betas=(rule.momentum, 0.999))
    return torch.optim.SGD(stand_in, momentum=rule.momentum if rule.optimizer == "momentum" else 0.0)


def _apply(optimizer: torch.optim.Optimizer, before: Tensor, ascent: Tensor, lr: float) -> Tensor:
    """Return the weights after one step of size lr along `ascent`; `before` is left as it is."""
    group = optimizer.param_groups[0]
    parameter = group["params"][0]
    group["lr"] = lr
    parameter.data, parameter.grad = before.clone(), -ascent
    optimizer.step()
    after = parameter.data
    parameter.data, parameter.grad = torch.empty(0), None
    return after


def checksum(params: Params) -> str:
    """Return 16 hex digits that change with any bit of any tensor, and with the tensors' names and order."""
    digest = hashlib.sha256()
    for name, tensor in params.items():
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        data = data if data.storage_offset() % 8 == 0 else data.clone()
        tail = len(data) % 8
        words = data[: len(data) - tail].view(torch.int64)
        sums = [_position_weighted_sum(chunk) for chunk in words.split(_ENTRIES_PER_CHUNK)]
        digest.update(
            f"{name} {tensor.dtype} {torch.stack(sums).tolist()} {data[len(data) - tail :].tolist()}".encode()
        )
    return digest.hexdigest()[:16]


def _position_weighted_sum(words: Tensor) -> Tensor:
    """Sum integers times odd weights that differ by position, modulo 2**64: (n,) int64 -> () int64."""
    return (words * _odd_numbers(words.device)[: len(words)]).sum()


@lru_cache(maxsize=2)
def _odd_numbers(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * _ENTRIES_PER_CHUNK, 2, device=device)
