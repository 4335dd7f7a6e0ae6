"""The rates of this CPU for one run: a few layers of the model's shape, with random weights, for some seconds."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_es.cpu.engine import FEWEST_ROWS
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import engine_of
from rwkv_es.engine.memory import Load
from rwkv_es.engine.stops import Stops
from rwkv_es.es.update import Rule, Updater, checksum
from rwkv_es.model.batch import MULTIPLES, padded, shares
from rwkv_es.model.forward import Model, draw_factors, new_state, perturb, unperturbed
from rwkv_es.model.int8 import is_quantizable, quantize
from rwkv_es.model.layout import Arch, expected_shapes
from rwkv_es.model.sampler import SamplingParams, sample
from rwkv_es.model.weights import Weights
from rwkv_es.noise.factors import Noise
from rwkv_es.noise.targets import Target
from rwkv_es.planning.devices import Device
from rwkv_es.planning.speed import work

_WEIGHT_BYTES = 1 << 29  # as many layers as make this much: more than what a cache holds
_TIMES = 5  # of each call; the median counts
_LONGEST_S = 6.0  # for the calls of one kind
clock = time.perf_counter  # `scripts/check_plan.py` counts the processor's seconds instead
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(arch: Arch, targets: Mapping[str, Target], load: Load, rows_per_member: int, device: Device) -> Device:
    """Return the device with the rates of its CPU for this load: `load.slots` rows, `load.population` members."""
    torch.set_num_threads(1 if load.engine == "numba" else load.threads)  # the fused engine has threads of its own
    small = _shortened(arch, load)
    model = _stand_in(small, load)
    chosen = {name: target for name, target in targets.items() if name in model.params}
    noise = Noise(0, chosen).at(0, 1e-3)
    rows = padded(load.slots, MULTIPLES[0])
    pairs = min(-(-rows // 2), -(-load.population // (2 * load.processes)))
    factors = draw_factors(noise, model, range(pairs))
    weights = perturb(model, factors, torch.arange(rows) // rows_per_member % (2 * pairs))
    done = work(small, chosen, load._replace(slots=rows), rows_per_member)
    sampling = SamplingParams(temperature=load.temperature, top_p=0.9 if load.is_cut else 1.0)
    decoding = GenerationConfig(_NO_STOPS, sampling, rows, load.engine, load.threads)
    products_s = _products_seconds(model, rows, load.threads if load.engine == "numba" else 1)
    with engine_of(model, decoding, factors) as engine:
        forward_s, head_s = _tick_seconds(engine, model, weights, decoding.sampling)
    return device._replace(
        flops=done.block_flops / products_s,
        bandwidth=done.other_bytes / max(forward_s - products_s, 0.05 * forward_s),
        head_flops=done.head_flops / head_s,
        updates=_updates(model, noise, load),
        is_measured=True,
    )


_NO_STOPS = Stops(-1, (), np.zeros(0, bool), [])


def _shortened(arch: Arch, load: Load) -> Arch:
    """Return the model with no more layers than it takes to be out of any cache."""
    layer = 12 * arch.n_embd * arch.n_embd * _DTYPES[load.dtype].itemsize
    return arch._replace(n_layer=min(arch.n_layer, max(2, _WEIGHT_BYTES // layer)))


def _stand_in(arch: Arch, load: Load) -> Model:
    """Make a model of random weights, all cut from the same numbers."""
    params: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, shape in expected_shapes(arch).items():
        size = torch.Size(shape)
        values = block.repeat(-(-size.numel() // len(block)))[: size.numel()].reshape(size) * shape[-1] ** -0.5
        if load.quantize == "int8" and is_quantizable(name, shape):
            params[name], scales[name] = quantize(values)
        else:
            params[name] = values.to(_DTYPES[load.dtype])
    state_dtype = torch.float16 if load.state_dtype == "fp16" else torch.float32
    return Model(params, arch, scales, state_dtype, is_fp8=load.quantize == "fp8")


def _products_seconds(model: Model, rows: int, num_threads: int) -> float:
    """Time the products of a tick, with their rows shared out to threads."""
    first, *others = [stop - start for start, stop in shares(rows, num_threads, MULTIPLES[0], FEWEST_ROWS)]
    with ThreadPoolExecutor(num_threads) as threads:

        def call() -> None:
            jobs = [threads.submit(_products, model, count) for count in others]
            _products(model, first)
            for job in jobs:
                job.result()

        return _seconds(call)


def _products(model: Model, rows: int) -> None:
    """Make the products of all layers, and nothing else."""
    weights = unperturbed(model)
    for name, weight in model.params.items():
        if weight.dim() == 2 and name.startswith("blocks.") and not name.endswith("r_k"):
            is_large = name.endswith(".weight")
            times, width = (weights.linear, weight.shape[1]) if is_large else (weights.project, weight.shape[0])
            times(model.like.new_zeros(rows, width), name)


def _tick_seconds(engine: Any, model: Model, weights: Weights, sampling: SamplingParams) -> tuple[float, float]:
    """Time reading one token per row, and choosing the next one."""
    assert weights.direction is not None
    rows = len(weights.direction)
    tokens, state = torch.arange(rows) % model.arch.n_vocab, new_state(model, rows)
    counter = torch.zeros(rows, 4, dtype=torch.int64)
    x = engine.forward(weights, model.arch, tokens, state)
    forward_s = _seconds(lambda: engine.forward(weights, model.arch, tokens, state))
    return forward_s, _seconds(lambda: sample(engine.logits(weights, x), sampling, counter))


def _updates(model: Model, noise: Any, load: Load) -> float:
    """Return how many weights an update moves a second, with the noise of the step and a checksum."""
    names = [name for name in noise.targets if not name.startswith("blocks.") or name.startswith("blocks.1.")]
    updater = Updater(model, names, Rule(optimizer=load.optimizer, master=load.master), {})
    fitness = torch.linspace(-1, 1, load.population)
    update_s = _seconds(lambda: updater.step(noise, fitness, 1e-3))
    draw_s = _seconds(lambda: draw_factors(noise, model, range(1)))
    pairs = -(-load.population // (2 * load.processes))
    checksum_s = _seconds(lambda: checksum(updater.weights()))
    moved = sum(model.params[name].numel() for name in names)
    whole = sum(model.params[name].numel() for name in noise.targets)
    return whole / (update_s * whole / moved + draw_s * pairs + checksum_s)


def _seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call, after one that warms up."""
    call()
    taken: list[float] = []
    while len(taken) < _TIMES and sum(taken) < _LONGEST_S:
        start = clock()
        call()
        taken.append(clock() - start)
    return median(taken)
