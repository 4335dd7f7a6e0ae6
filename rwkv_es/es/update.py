"""The ES update: the fitness-weighted sum of the perturbations, tensor by tensor, then an optimiser's step."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_es.es.masters import Exact, Masters
from rwkv_es.model import int8
from rwkv_es.model.forward import Model
from rwkv_es.model.int8 import row_blocks
from rwkv_es.noise.factors import WHOLE, StepNoise, gpu_kernels, hash_key, philox
from rwkv_es.noise.lowrank import weighted_sum, weighted_sum_in_parts
from rwkv_es.pretrained.checkpoint import Params
from rwkv_es.system.errors import ConfigError

try:
    from rwkv_es.noise.rounding import round_to_bf16
except ImportError:  # numba is missing or does not fit the installed numpy
    round_to_bf16 = None

_VALUES_PER_CHUNK = 1 << 22  # of the factors drawn at once: whatever the number of processes, in the same order
_VALUES_ELSEWHERE = 1 << 27  # the same on a GPU
_SHARE_OF_MASTERS = 3  # they may take the third part of a GPU's memory that the weights leave
_FEWEST = 64  # directions in a chunk
_ENTRIES_PER_CHUNK = 1 << 20
_ENTRIES_PER_SLAB = 1 << 22  # of a matrix; a step holds some five slabs in fp32
_ENTRIES_ELSEWHERE = 1 << 27  # the same on a GPU


class Rule(NamedTuple):
    """How the ES gradient becomes a step; names as in `config.Config`."""

    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    master: str = "fp32"
    seed: int = 0


def gradient(noise: StepNoise, name: str, fitness: Tensor, rows: slice = WHOLE) -> Tensor:
    """Return `g = 1/N sum_n f_n s_n A_j B_j.T / sqrt(r)`, fp32, on the device of fitness (N,).

    Shape (*batch,p,q) of the target, or some rows of a matrix. Mirrored members are folded first: they share A and B.
    """
    target = noise.targets[name]
    folded = (fitness[0::2] - fitness[1::2]).float() / (len(fitness) * math.sqrt(target.rank))  # (N/2,)
    in_parts = _is_elsewhere(fitness.device) and not (target.batch or target.is_full)
    most, dtype = (_VALUES_ELSEWHERE, torch.bfloat16) if in_parts else (_VALUES_PER_CHUNK, torch.float32)
    collect, per_chunk = weighted_sum_in_parts if in_parts else weighted_sum, max(most // target.num_values, _FEWEST)
    total: Tensor | None = None
    for start in range(0, len(folded), per_chunk):
        chunk = folded[start : start + per_chunk]
        a, b = noise.factors(name, torch.arange(start, start + len(chunk), device=chunk.device), rows, dtype)
        part = collect(a, b, chunk)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _is_elsewhere(device: torch.device) -> bool:
    """Say whether the weights are on a GPU: its memory is another, and large products and copies are what it is for."""
    return device.type != "cpu"


class Updater:
    """Moves a model's weights in place; holds what the optimiser remembers and the fp32 master copy of bf16 weights.

    Without such memory nothing is held beside the weights but a slab of one matrix's rows, a few times over.
    """

    def __init__(self, model: Model, names: Sequence[str], rule: Rule, base: Params) -> None:
        self.params, self.scales, self.rule, self.base = model.params, model.scales, rule, base
        self.names, self.device = names, model.like.device
        low = [name for name in names if self.params[name].dtype == torch.bfloat16 and rule.master == "fp32"]
        self.master = Masters(self.params, low, in_parts=self._has_room(low))
        self.optimizers = {} if rule.optimizer == "sgd" else {name: _optimizer(rule, self.device) for name in names}

    def _has_room(self, low: Sequence[str]) -> bool:
        """Say whether the masters' parts go where the weights are, on a GPU; see `engine.memory.masters_have_room`."""
        if self.device.type != "cuda":
            return _is_elsewhere(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return _SHARE_OF_MASTERS * sum(2 * self.params[name].numel() for name in low) <= free

    def step(self, noise: StepNoise, fitness: Tensor, lr: float) -> dict[str, float]:
        """Apply `W += lr * multiplier * g` (or the optimiser's version of it) to every target, in place.

        fitness (N,) of all members of the step. Returns the root mean square of each target's step, before it is
        rounded, in units of its own noise scale sigma * multiplier.

        Raises:
            ConfigError: a step is not finite.
        """
        fitness = fitness.to(self.device)
        return {name: self._step_tensor(name, noise, fitness, lr) for name in self.names}

    def weights(self) -> Params:
        """Return the most exact weights there are: master copies where they exist; all but int8 in one dtype."""
        params, dtype = self.exact()
        if dtype is None:
            return self.params
        return {name: w if name in self.scales else w.to(dtype).cpu() for name, w in params.items()}

    def exact(self) -> tuple[Mapping[str, Tensor], torch.dtype | None]:
        """Return the same without any copy, and the dtype that they are to be taken in (None: as they are)."""
        if not self.master:
            return self.params, None
        return Exact(self.params, self.master), torch.float32

    def distance(self) -> float:
        """Return how far an entry of the targets is from the base: the root mean square of W - W0."""
        squares = 0.0
        for name in self.names:
            shape = tuple(self.params[name].shape)
            for rows in row_blocks(shape, _ENTRIES_PER_SLAB) if len(shape) == 2 else [WHOLE]:
                flat = self._drift(name, rows).flatten()
                squares += torch.dot(flat, flat).item()
        return math.sqrt(squares / sum(self.params[name].numel() for name in self.names))

    def state(self) -> dict[str, Any]:
        """Return what the optimisers remember, for a snapshot."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items() if optimizer.state}

    def load(self, params: Params, state: Mapping[str, Any]) -> None:
        """Continue from a snapshot's weights (in the dtype of `weights()`) and optimiser state, in place."""
        for name, weight in self.params.items():
            assert (params[name].dtype == torch.int8) == (name in self.scales), f"{name} is {params[name].dtype}"
            weight.copy_(params[name])
        for name in self.master:
            self.master.write(name, WHOLE, params[name])
        for name, saved in state.items():
            self.optimizers[name].load_state_dict(saved)

    def _step_tensor(self, name: str, noise: StepNoise, fitness: Tensor, lr: float) -> float:
        multiplier = noise.targets[name].multiplier
        squares = 0.0
        for rows in self._slabs(name, noise):
            g = gradient(noise, name, fitness, rows).reshape(self.params[name][rows].shape)
            direction, size = self._direction(name, rows, g, lr, multiplier)
            flat = direction.flatten()
            squares += (torch.dot(flat, flat) * size * size).item()
            if not math.isfinite(squares):
                raise ConfigError(f"the update of {name} at step {noise.step} is not finite; lower lr (now {lr})")
            self._add(name, rows, direction, size, noise.step)
        return math.sqrt(squares / self.params[name].numel()) / (noise.sigma * multiplier)

    def _slabs(self, name: str, noise: StepNoise) -> Iterable[slice]:
        """Cut a matrix into slabs of rows; small tensors, and those that an optimiser knows as one, stay whole."""
        target = noise.targets[name]
        if name in self.optimizers or target.is_full or target.batch:
            return [WHOLE]
        return row_blocks((target.p, target.q), _ENTRIES_ELSEWHERE if _is_elsewhere(self.device) else _ENTRIES_PER_SLAB)

    def _direction(self, name: str, rows: slice, g: Tensor, lr: float, multiplier: float) -> tuple[Tensor, float]:
        """Return what to add to some rows, as a direction and a size; g may be overwritten."""
        size = lr * multiplier
        if name in self.optimizers:
            g, size = _ascend(self.optimizers[name], g, size), 1.0
        if self.rule.weight_decay:
            g, size = g.mul_(size).sub_(self._drift(name, rows), alpha=lr * self.rule.weight_decay), 1.0
        return g, size

    def _drift(self, name: str, rows: slice) -> Tensor:
        """Return W - W0 of some rows, fp32; an int8 matrix starts from the base as it was rounded."""
        stored = self.params[name][rows]
        if name in self.scales:
            start = int8.on_grid(self.base[name][rows].to(self.device), self.scales[name][rows])
            return stored.float().sub_(start).mul_(self.scales[name][rows, None])
        is_copy = name in self.master.held
        drift = self.master.read(name, rows) if is_copy else stored.to(torch.float32, copy=True)
        return drift.sub_(self.base[name][rows].to(self.device)) if name in self.base else drift

    def _add(self, name: str, rows: slice, direction: Tensor, size: float, step: int) -> None:
        stored = self.params[name][rows]
        key, first = hash_key("rounding", self.rule.seed, name), (rows.start or 0) * stored[0].numel()
        if name in self.scales:
            steps = direction.mul_(size).div_(self.scales[name][rows, None])
            int8.move(stored, steps, key, step, first)
        elif name in self.master.held:
            self.master.write(name, rows, self.master.read(name, rows).add_(direction, alpha=size))
        elif stored.dtype == torch.bfloat16:
            stored.copy_(round_stochastically(stored.float().add_(direction, alpha=size), key, step, first))
        else:
            stored.add_(direction, alpha=size)


def round_stochastically(values: Tensor, key: tuple[int, int], step: int, first: int = 0) -> Tensor:
    """Round fp32 to a bf16 neighbour, up with a probability equal to the remainder; noise from counters.

    values (...) -> (...) bf16; right on average, so that steps below a bf16 ulp are not lost. The first value is entry
    `first` of its tensor, a multiple of 8.
    """
    flat = values.contiguous().flatten()
    rounded = torch.empty_like(flat, dtype=torch.bfloat16)
    if round_to_bf16 is not None and flat.device.type == "cpu":
        out = rounded.view(torch.int16).numpy().view(np.uint16)
        round_to_bf16(out, flat.numpy().view(np.uint32), first, step, np.array(key, np.uint64))
        return rounded.reshape(values.shape)
    if (kernels := gpu_kernels(flat.device)) is not None:
        kernels.round_to_bf16(rounded, flat, first, step, key)
        return rounded.reshape(values.shape)
    for start in range(0, len(flat), _ENTRIES_PER_CHUNK):
        bits = flat[start : start + _ENTRIES_PER_CHUNK].view(torch.int32)
        noise = _random_16_bits(first + start, len(bits), key, flat.new_tensor(step, dtype=torch.int64))
        shifted = ((bits.long() + noise) & ~0xFFFF).int()  # the magnitude's bits: towards or away from zero alike
        rounded[start : start + len(bits)] = shifted.view(torch.float32).bfloat16()
    return rounded.reshape(values.shape)


def _random_16_bits(start: int, count: int, key: tuple[int, int], step: Tensor) -> Tensor:
    """Return (count,) int64 below 2**16 for the entries from `start` (a multiple of 8) on."""
    blocks = torch.arange(start // 8, (start + count + 7) // 8, device=step.device)
    counter = torch.stack((blocks & 0xFFFFFFFF, blocks >> 32, step.expand_as(blocks), torch.zeros_like(blocks)), -1)
    words = philox(counter, key)  # (blocks,4)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[:count]


def _optimizer(rule: Rule, device: torch.device) -> torch.optim.Optimizer:
    """Make a torch optimiser over one stand-in parameter; its tensor is set anew at every step."""
    stand_in = [torch.nn.Parameter(torch.empty(0, device=device))]
    if rule.optimizer == "adam":
        return torch.optim.Adam(stand_in, betas=(rule.momentum, 0.999))
    return torch.optim.SGD(stand_in, momentum=rule.momentum)


def _ascend(optimizer: torch.optim.Optimizer, ascent: Tensor, lr: float) -> Tensor:
    """Return how far the optimiser moves the weights, wherever they are; `ascent` is overwritten."""
    group = optimizer.param_groups[0]
    parameter = group["params"][0]
    group["lr"] = lr
    empty = parameter.data
    parameter.data = torch.zeros_like(ascent)
    parameter.grad = ascent.neg_()
    optimizer.step()
    moved = parameter.data
    parameter.data, parameter.grad = empty, None
    return moved


def checksum(params: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return 16 hex digits that change with any bit of any tensor, and with the tensors' names and order.

    dtype: take all floating-point tensors as if they were of this type, without copying them.
    """
    digest = hashlib.sha256()
    for name, tensor in params.items():
        seen = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        flat = tensor.detach().contiguous().flatten()
        if seen == tensor.dtype:
            flat = flat if flat.storage_offset() * flat.element_size() % 8 == 0 else flat.clone()
        tail = flat.numel() * seen.itemsize % 8 // seen.itemsize  # entries behind the last whole word
        whole, rest = flat[: flat.numel() - tail], flat[flat.numel() - tail :].to(seen).view(torch.uint8)
        digest.update(f"{name} {seen} {_weighted_sums(whole, seen)} {rest.tolist()}".encode())
    return digest.hexdigest()[:16]


def _weighted_sums(values: Tensor, dtype: torch.dtype) -> list[int]:
    """Sum the 64-bit words of values taken as `dtype`, times odd weights by position, modulo 2**64: one sum a chunk."""
    odd = _odd_numbers(values.device)
    products = torch.empty_like(odd)  # one buffer: small results between large ones that are freed tear holes
    per_word = 8 // dtype.itemsize
    words = (chunk.to(dtype).view(torch.int64) for chunk in values.split(len(odd) * per_word))
    sums = [torch.mul(c, odd[: len(c)], out=products[: len(c)]).sum() for c in words]
    return torch.stack(sums).tolist()


@lru_cache(maxsize=2)
def _odd_numbers(device: torch.device) -> Tensor:
    return torch.arange(1, 2 * _ENTRIES_PER_CHUNK, 2, device=device)
