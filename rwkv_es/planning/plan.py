"""What a training run will take, from its options: memory, disk, network, time.

Nothing is loaded but the file's header and the task's numbers; torch only if the rates of this CPU are measured.
"""

import math
import os
import shutil
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from rwkv_es.config.file import run_folder
from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.engine.memory import (
    BYTES,
    DEFAULT_SLOTS,
    MOMENTS,
    SLOTS_AT_ONCE,
    Load,
    Memory,
    is_int8,
    most_slots,
    needed,
    targets_of,
)
from rwkv_es.model.layout import expected_shapes
from rwkv_es.noise.targets import Target
from rwkv_es.planning.asking import Asked, asked_of, held_out_of
from rwkv_es.planning.devices import Device, devices_of, here, num_cores
from rwkv_es.planning.speed import Times, joined, times
from rwkv_es.pretrained.header import Header, describe
from rwkv_es.task.task import Task

WORKER_MEASURED = 20_000_000  # bytes of a process that scores answers: Python and a built-in task, not what it imports
_HOST_BANDWIDTH = 7e9  # bytes a second between a GPU and pageable memory of its host
_WIRE_COUNTERS, _WIRE_REWARDS = 100, 240  # bytes of a process and step besides the rewards; with --reward


_CHANGES: dict[str, dict[str, Any]] = {  # that take less memory
    "--state-dtype fp16": {"state_dtype": "fp16"},
    "--quantize int8": {"quantize": "int8"},
    "--optimizer sgd": {"optimizer": "sgd"},
    "--rank 1": {"rank": 1},
    "--dtype bf16 --master stochastic": {"dtype": "bf16", "master": "stochastic"},
}


class Disk(NamedTuple):
    """Bytes of the run folder, and what is free there."""

    snapshot: int  # one
    snapshots: int  # all that are kept at a time, and the one being written
    export: int
    ledger: int  # at the end
    free: int

    @property
    def total(self) -> int:
        """The most that the folder takes."""
        return self.snapshots + self.export + self.ledger


class Plan(NamedTuple):
    """A run, planned."""

    config: Config
    header: Header
    num_devices: int
    device: Device
    targets: dict[str, Target]
    load: Load  # of one process, in a step or in an evaluation that has more in flight
    asked: Asked
    memory: Memory  # of one process
    most: int  # generations in flight that fit a device, with this population
    widest: int  # the same with as many members as rows: each row under its own perturbation, one prompt a member
    times: Times | None  # of a step; None: no rates are known
    evaluation: Times | None  # on held-out problems

    @property
    def fits(self) -> bool:
        """Say whether the device holds what is asked (not known: yes)."""
        return not self.device.memory or self.memory.peak <= self.device.memory


def make_plan(config: Config, is_here: bool = False, task: Task | None = None) -> Plan:
    """Plan a run with these options (`gpus`, `prompt_tokens` and `measure` are those of the command `plan`).

    `is_here`: on this machine, in as many processes as a launcher has started. A `task` may be a Python object.

    Raises:
        RwkvEsError: the model, the task or a device does not exist.
    """
    header = describe(config.model)
    count, device = devices_of(config.gpus) if config.gpus else here(config.device)
    processes = int(os.environ.get("WORLD_SIZE", "1")) if is_here else count
    if is_here and device.kind == "cpu":
        device = device._replace(memory=device.memory // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    targets = targets_of(header.arch, config.targets, config.rank)
    asked = asked_of(config, task)
    load = load_of(config, header, targets, device.kind, processes, has_turns=asked.has_turns)
    load = load._replace(card=device.memory)
    free = device.memory or 1 << 62
    most, _ = most_slots(free, header.arch, targets, load)
    widest, _ = most_slots(free, header.arch, targets, load, rows_per_member=1)
    chosen = config.slots or (DEFAULT_SLOTS if device.kind == "cpu" else most // SLOTS_AT_ONCE * SLOTS_AT_ONCE or most)
    evaluated = held_out_of(config, asked) if config.eval_every and config.eval_size else None
    in_flight = [
        max(1, min(chosen, -(-each.first.answers // processes))) for each in (asked, evaluated) if each is not None
    ]
    load = load._replace(slots=in_flight[0])
    if config.measure:
        device = _measured(header, targets, load, asked.first.rows_per_member, device)
    load = load._replace(slots=max(in_flight))
    memory = needed(header.arch, targets, load)
    is_timed = device.flops > 0 and device.bandwidth > 0
    return Plan(
        config=config,
        header=header,
        num_devices=processes,
        device=device,
        targets=targets,
        load=load,
        asked=asked,
        memory=memory,
        most=most,
        widest=widest,
        times=_times(header, targets, load, asked, device) if is_timed else None,
        evaluation=_times(header, targets, load, evaluated, device) if is_timed and evaluated else None,
    )


def load_of(
    config: Config, header: Header, targets: dict[str, Target], kind: str, processes: int, *, has_turns: bool
) -> Load:
    """Return what the options ask of one process on a CPU ("cpu") or a GPU ("cuda")."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "fp32" if kind == "cpu" else "bf16" if header.dtype == "fp16" else header.dtype
    return Load(
        slots=config.slots or DEFAULT_SLOTS,
        population=config.population,
        processes=processes,
        dtype=dtype,
        quantize=config.quantize,
        state_dtype=config.state_dtype,
        master=config.master,
        optimizer=config.optimizer,
        engine=_engine(config, targets, kind, dtype, has_turns=has_turns),
        threads=config.threads or num_cores(),
        temperature=config.temperature,
        is_cut=config.top_p < 1 or config.top_k > 0 or config.min_p > 0,
        saved_per_slot=(config.samples > 1) + (config.shots != "0" or bool(config.system)),
        has_turns=has_turns,
        has_references=objective_of(config.objective).logprob > 0,
        device=kind,
    )


def disk_of(plan: Plan) -> Disk:
    """Return what the run folder takes."""
    config, load, shapes = plan.config, plan.load, expected_shapes(plan.header.arch)
    in_8_bits = {name for name, shape in shapes.items() if is_int8(load, name, shape)}
    width = 4 if load.master == "fp32" and not plan.targets.keys() <= in_8_bits else BYTES[load.dtype]  # with masters
    entries = {name: math.prod(shape) for name, shape in shapes.items()}
    moved = sum(math.prod(t.batch) * t.p * t.q for t in plan.targets.values())
    weights = sum(n if name in in_8_bits else width * n for name, n in entries.items())
    snapshot = weights + 4 * MOMENTS[load.optimizer] * moved
    numbers = config.population * (config.prompts + 1)  # packed, 8 bytes each at worst, written as text
    ledger = config.steps * (11 * numbers + 3000)
    place = run_folder(config).absolute()
    while not place.exists():
        place = place.parent
    return Disk(
        snapshot=snapshot,
        snapshots=(config.keep + 2) * snapshot,
        export=sum(entries.values()) * BYTES[plan.header.dtype],
        ledger=ledger,
        free=shutil.disk_usage(place).free,
    )


def wire_bytes(plan: Plan) -> int:
    """Return what all processes send each other in a step: rewards, and a few counters."""
    others = plan.num_devices - 1
    counters = _WIRE_REWARDS if plan.config.reward else _WIRE_COUNTERS
    return others * 8 * plan.config.population * plan.config.prompts + counters * plan.num_devices * (others > 0)


def alternatives(plan: Plan) -> dict[str, int]:
    """Return options that let more generations fit a device, and how many: the most helpful first.

    Several options at once only if nothing fits with one of them.
    """
    changes = [change for change in _CHANGES if any(getattr(plan.config, n) != v for n, v in _CHANGES[change].items())]
    for count in range(1, len(changes) + 1 if not plan.most else 2):
        together = {" ".join(texts): _most_with(plan, texts) for texts in combinations(changes, count)}
        found = {text: slots for text, slots in together.items() if slots > plan.most}
        if found:
            return dict(sorted(found.items(), key=lambda item: -item[1]))
    return {}


def _most_with(plan: Plan, texts: tuple[str, ...]) -> int:
    values = {name: value for text in texts for name, value in _CHANGES[text].items()}
    config = replace(plan.config, **values)
    targets = targets_of(plan.header.arch, config.targets, config.rank)
    load = load_of(config, plan.header, targets, plan.device.kind, plan.load.processes, has_turns=plan.asked.has_turns)
    load = load._replace(card=plan.device.memory)
    return most_slots(plan.device.memory, plan.header.arch, targets, load)[0]


def _engine(config: Config, targets: dict[str, Target], kind: str, dtype: str, *, has_turns: bool) -> str:
    """Return the engine that `auto` chooses: fused kernels if they know all targets; those of GPUs have no turns."""
    if config.engine != "auto":
        return config.engine
    is_plain = config.quantize == "none"
    outside = ("ln_out.weight", "ln_out.bias", "blocks.0.ln0.weight", "blocks.0.ln0.bias")
    if kind == "cuda":
        knows_all = all(name in outside or not target.is_full for name, target in targets.items())
        return "triton" if knows_all and not has_turns else "torch"
    return "numba" if dtype == "fp32" and is_plain else "torch"


def _times(header: Header, targets: dict[str, Target], load: Load, asked: Asked, device: Device) -> Times:
    """Return how long a step takes; masters that a GPU has no place for come and go in the update."""
    found = joined([times(header.arch, targets, load, part, device) for part in asked.parts])
    if load.device == "cpu" or needed(header.arch, targets, load).masters:
        return found
    masters = needed(header.arch, targets, load._replace(device="cpu", engine="torch")).masters
    return found._replace(update_s=found.update_s + 2 * masters / _HOST_BANDWIDTH)


def _measured(header: Header, targets: dict[str, Target], load: Load, rows: int, device: Device) -> Device:
    from rwkv_es.system.errors import ConfigError

    if device.kind != "cpu":
        raise ConfigError("measure times this machine's CPU; leave it out for GPUs, or add --device cpu")
    from rwkv_es.planning.benchmark import measure

    return measure(header.arch, targets, load, rows, device)
