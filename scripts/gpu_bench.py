"""What the cases of `bench_gpu.py` share: the model's sizes, clocks, and a JSON line for every figure."""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import Stops
from rwkv_es.gpu.engine import GpuEngine
from rwkv_es.gpu.slots import Entry, GpuSlots, Sizes
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Arch, expected_shapes
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.model.weights import Factors
from rwkv_es.noise.factors import Noise, StepNoise, select

TINY = Arch(2, 64, 1, 64, 64, 256, 16, 16, 16, 32)
SMALL = Arch(2, 1024, 16, 64, 1024, 4096, 64, 64, 64, 128)  # what numpy can write out
OF_7B = Arch(32, 4096, 64, 64, 65536, 16384, 128, 128, 96, 480)
COPY, FLOPS = 3.0e12, 790e12  # of an H100, until they are measured: bytes and operations a second


@dataclass
class Bench:
    """What is measured, and what was found of the card so far."""

    arch: Arch
    rows: list[int]
    rank: int
    device: torch.device
    is_tiny: bool
    copy: float = COPY
    flops: float = FLOPS
    lines: list[dict[str, Any]] = field(default_factory=list)

    def say(self, case: str, name: str, value: float, unit: str, **more: Any) -> None:
        """Print one figure; `floor` and `predicted` are in the same unit, predictions are for an H100."""
        card = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu, interpreted"
        known = {key: value for key, value in more.items() if value is not None}
        line = {"case": case, "name": name, "measured": float(f"{value:.6g}"), "unit": unit, **known, "card": card}
        self.lines.append(line)
        print(json.dumps(line), flush=True)

    def seconds(self, call: Callable[[], Any], repeats: int = 20, before: Callable[[], Any] | None = None) -> float:
        """Return the median time of a call, by events on a GPU; `before` is not timed. Once: without warming up."""
        found, num_warm = [], 0 if repeats == 1 or self.is_tiny else 3
        for i in range(num_warm + (1 if self.is_tiny else repeats)):
            if before is not None:
                before()
            taken = self._once(call)
            if i >= num_warm:
                found.append(taken)
        return statistics.median(found)

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = perf_counter()
            call()
            return perf_counter() - start
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        """Return random numbers on the device."""
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)

    def model(self, num_layers: int = 0, state: torch.dtype = torch.float32) -> Model:
        """Return a random model in bf16, made where it is used."""
        arch, params = self.arch._replace(n_layer=num_layers or self.arch.n_layer), {}
        torch.manual_seed(0)
        for name, shape in expected_shapes(arch).items():
            is_matrix = len(shape) == 2 and not name.endswith("r_k")
            scale = shape[-1] ** -0.5 if is_matrix else 0.1
            params[name] = self.random(*shape, scale=scale) + (0 if is_matrix else 1)
        return Model(params, arch, state_dtype=state)

    def noise(self, model: Model) -> StepNoise:
        """Return the noise of all matrices."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
        return Noise(0, select(shapes, {"matrices": 1.0}, self.rank)).at(0, 1e-3)


def tick_floor(bench: Bench, rows: int, state: torch.dtype) -> float:
    """Return the seconds of a tick's products and state traffic, one after the other."""
    a = bench.arch
    pairs = a.rank_w + a.rank_a + a.rank_v + a.rank_g
    per_layer = 4 * a.n_embd**2 + 2 * a.n_embd * a.n_ffn + 2 * a.n_embd * pairs
    operations = 2 * rows * (a.n_layer * per_layer + a.n_embd * a.n_vocab)
    states = 2 * rows * a.n_layer * a.n_embd * (64 * torch.empty(0, dtype=state).element_size() + 4)
    return operations / bench.flops + states / bench.copy


def filled(engine: GpuEngine, factors: Factors | None, rows: int, sampling: SamplingParams) -> GpuSlots:
    """Return slots full of requests that go on writing, their tick captured."""
    sizes = Sizes(rows, prompt=1, written=4096, at_once=8, saved=0, ahead=2, num_words=engine.model.arch.n_vocab)
    slots = GpuSlots(engine, factors, sizes, GenerationConfig(never(sizes.num_words), sampling))
    slots.prepare([rows], [])
    first = 0 if factors is None else 2 * factors.first
    members = 1 if factors is None else 2 * factors.num_directions
    requests = [Request(first + i % members, i, (1 + i % 50,), 4096) for i in range(rows)]
    slots.admit([Entry(i, request, 0, -1) for i, request in enumerate(requests)], [])
    return slots


def never(num_words: int) -> Stops:
    """Return stops that stop nothing."""
    import numpy as np

    return Stops(-1, (), np.zeros(num_words, bool), [b"x"] * num_words)


def decoding(bench: Bench, slots: int, sampling: SamplingParams) -> GenerationConfig:
    """Return how a rollout of the bench's model decodes."""
    return GenerationConfig(never(bench.arch.n_vocab), sampling, slots, "triton")


def note(text: str) -> None:
    """Say something that is no figure."""
    print(text, file=sys.stderr, flush=True)
