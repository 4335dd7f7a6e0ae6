"""How long a step takes, by a roofline: products at a rate of FLOP/s, all else at a rate of bytes/s. Needs no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rwkv_es.engine.memory import BYTES, Load, state_bytes
from rwkv_es.model.layout import Arch, expected_shapes
from rwkv_es.noise.targets import Target
from rwkv_es.planning.devices import Device

_ACTIVATIONS = 40  # numbers of length C that a layer's kernels read and write between its products, for a row
_OVER_FLOOR = {"triton": 1.4, "torch": 4.0}  # GPU, predicted: kernels wait for each other; torch reads states 8 times
_PRODUCTS_PER_UPDATE = 2  # in bf16, for the two halves of the fitness: the sum is fp32
_UPDATE_BYTES = 24  # of a weight that is moved: the sum in fp32 three times, the weight itself


class Workload(NamedTuple):
    """What a step generates in all."""

    answers: int
    prompt_tokens: int
    new_tokens: int
    rows_per_member: int  # problems times samples


class Tick(NamedTuple):
    """Seconds of a tick in which every row reads one token; `logits` only if rows write."""

    products: float
    others: float
    head: float
    rest: float

    @property
    def reading(self) -> float:
        """While prompts are read."""
        return self.products + self.others + self.rest

    @property
    def writing(self) -> float:
        """While answers are written."""
        return self.reading + self.head


class Times(NamedTuple):
    """Seconds of a step, and tokens read and written a second by all processes while answers are generated."""

    tick: Tick
    generate_s: float
    update_s: float
    tokens_per_s: float


class Work(NamedTuple):
    """What a tick does, for all rows of a process."""

    block_flops: float
    head_flops: float
    weight_bytes: float
    other_bytes: float  # states, factors, activations
    logit_bytes: float


def work(arch: Arch, targets: Mapping[str, Target], load: Load, rows_per_member: int) -> Work:
    """Count the operations and bytes of a tick with `load.slots` rows."""
    shapes, width, rows = expected_shapes(arch), BYTES[load.dtype], load.slots
    matrices = {
        name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and not name.endswith("r_k")
    }
    head = matrices.pop("head.weight")
    del matrices["emb.weight"]
    entries = sum(matrices.values())
    directions = min(-(-rows // (2 * rows_per_member)), -(-load.population // (2 * load.processes)))
    factors = directions * width * sum(target.num_values for target in targets.values())
    activations = rows * arch.n_layer * _ACTIVATIONS * arch.n_embd * width
    return Work(
        block_flops=2.0 * rows * entries / (2 if load.quantize == "fp8" else 1),  # GPUs multiply fp8 twice as fast
        head_flops=2.0 * rows * head,
        weight_bytes=float((entries + head) * (width if load.quantize == "none" else 1)),
        other_bytes=2.0 * rows * state_bytes(arch, load) + factors + activations,
        logit_bytes=2.0 * rows * arch.n_vocab * (4 if load.dtype == "fp32" else 6),
    )


def tick(done: Work, device: Device, engine: str) -> Tick:
    """Return how long a tick takes on a device whose rates are known."""
    over = 1.0 if device.is_measured else _OVER_FLOOR.get(engine, 1.0)
    loading = done.weight_bytes / (done.block_flops + done.head_flops) / device.bandwidth  # seconds an operation
    each = (1 / device.flops if device.is_measured else max(1 / device.flops, loading)) * over
    if device.head_flops:
        head = done.head_flops / device.head_flops
    else:
        head = done.head_flops * each + done.logit_bytes / device.bandwidth * over
    return Tick(done.block_flops * each, done.other_bytes / device.bandwidth * over, head, device.tick_s)


def times(arch: Arch, targets: Mapping[str, Target], load: Load, asked: Workload, device: Device) -> Times:
    """Return how long a step takes; every answer is as long as it may be."""
    here = -(-asked.answers // load.processes)
    done = work(arch, targets, load._replace(slots=min(load.slots, here)), asked.rows_per_member)
    one = tick(done, device, load.engine)
    turns = max(1.0, here / load.slots)  # slots are refilled at once
    num_reading = asked.prompt_tokens - 1  # the last token of a prompt already gives logits
    generate = turns * (num_reading * one.reading + asked.new_tokens * one.writing)
    tokens = asked.answers * (asked.prompt_tokens + asked.new_tokens)
    return Times(one, generate, update(targets, load, device), tokens / generate)


def joined(parts: Sequence[Times]) -> Times:
    """Return how long several loads take one after the other, with one update; the tick is the first one's."""
    generate = sum(part.generate_s for part in parts)
    return parts[0]._replace(
        generate_s=generate, tokens_per_s=sum(part.tokens_per_s * part.generate_s for part in parts) / generate
    )


def update(targets: Mapping[str, Target], load: Load, device: Device) -> float:
    """Return how long it takes to move all targets."""
    entries = sum(math.prod(t.batch) * t.p * t.q for t in targets.values())
    if device.updates:
        return entries / device.updates
    rank = max(target.rank for target in targets.values())
    flops = 2 * _PRODUCTS_PER_UPDATE * (load.population // 2) * rank  # a weight: its sum over all directions
    return entries * (flops / device.flops + _UPDATE_BYTES / device.bandwidth)
