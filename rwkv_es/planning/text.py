"""A plan as text: what a run takes, then what to change."""

from collections.abc import Iterator

from rwkv_es.noise.targets import Target
from rwkv_es.planning.plan import WORKER_MEASURED, Plan, alternatives, disk_of, wire_bytes
from rwkv_es.planning.walk import rate_lines, walk_lines
from rwkv_es.system.texts import size

_PARTS = {
    "program": "program and libraries",
    "weights": "weights",
    "masters": "fp32 masters",
    "optimizer": "optimiser",
    "factors": "factors",
    "states": "states",
    "saved": "states kept aside",
    "packed": "factors in the kernels' order",
    "scratch": "workspace",
    "logits": "logits and sampling",
}
_IN_8_BITS = {"none": "", "int8": ", int8 matrices", "fp8": ", products in fp8"}


def plan_lines(made: Plan) -> list[str]:
    """Return a plan as text: what it takes, then what to change."""
    walk = [*walk_lines(made.config, made.header.arch.n_embd), *rate_lines(made.config)]
    return [*_head(made), *_memory(made), *_flight(made), *_disk(made), *_time(made), *walk]


def duration(seconds: float) -> str:
    """Write a time: 0.12 s, 34 s, 5.6 min, 7.8 h."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _head(made: Plan) -> list[str]:
    config, load = made.config, made.load
    weights = sum(_entries(target) for target in made.targets.values())
    devices = f"{made.num_devices} x {made.device.name}" if made.num_devices > 1 else made.device.name
    needs_torch = load.has_turns and load.device == "cuda" and config.engine == "auto"
    return [
        f"{made.header.name} on {devices}: {load.dtype}{_IN_8_BITS[load.quantize]}, engine "
        f"{load.engine}, {load.state_dtype} states; {_millions(weights)} weights are trained",
        *(f"population {config.population} x prompts {config.prompts}{text}" for text in _asked(made)),
        *(["  change: --engine torch, which environments need on a GPU"] if needs_torch else []),
    ]


def _asked(made: Plan) -> Iterator[str]:
    (sampled, told, has_turns), samples = made.asked, made.config.samples
    after = f"tokens after prompts of {made.asked.first.prompt_tokens} (--prompt-tokens)"
    if sampled:
        what = "episodes" if has_turns else "answers"
        yield f" x samples {samples} = {sampled.answers:,} {what} a step, of at most {sampled.new_tokens:,} {after}"
    if told:
        yield f" = {told.answers:,} reference answers read a step, taken to have {told.new_tokens:,} {after}"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.0f} million" if number > 99e6 else f"{number / 1e6:.2g} million"


def _entries(target: Target) -> int:
    entries = target.p * target.q
    for number in target.batch:
        entries *= number
    return entries


def _memory(made: Plan) -> list[str]:
    memory = made.memory
    each = "per process" if made.num_devices > 1 else "in all"
    parts = [f"  {text:<30}{size(getattr(memory, name)):>9}" for name, text in _PARTS.items() if getattr(memory, name)]
    limit = f" of {size(made.device.memory)}" if made.device.memory else ""
    verdict = "" if made.fits else ": DOES NOT FIT"
    when = "answering" if memory.generating >= memory.update else "the update"
    lines = [f"memory, {made.load.slots:,} in flight, {each}:", *parts]
    if memory.update > memory.generating:
        lines.append(f"  {'the update (no states then)':<30}{size(memory.update):>9}")
    lines.append(f"  {'peak, while ' + when:<30}{size(memory.peak):>9}{limit}{verdict}")
    if memory.host:
        whole = f", {size(made.num_devices * memory.host)} for all" if made.num_devices > 1 else ""
        lines.append(f"  {'in the host, besides':<30}{size(memory.host):>9}{whole}")
    if made.config.reward_workers:
        lines.append(f"  {'reward workers, about':<30}{size(made.config.reward_workers * WORKER_MEASURED):>9}")
    return lines


def _flight(made: Plan) -> list[str]:
    if not made.device.memory:
        return []
    count, config = made.num_devices, made.config

    def total(slots: int) -> str:
        return f"{slots:,} per device, {slots * count:,} in all" if count > 1 else f"{slots:,}"

    lines = [
        f"most in flight: {total(made.most)}, with population {config.population}; {total(made.widest)}, with one "
        "answer a member"
    ]
    if made.fits:
        return lines
    if made.most:
        lines.append(f"  change: --slots {made.most}")
    return lines + _changes(made)


def _changes(made: Plan) -> list[str]:
    found = [f"  change: {text} lets {slots:,} fit" for text, slots in alternatives(made).items()]
    return found or ([] if made.most else ["  change: a device with more memory, or a smaller model"])


def _disk(made: Plan) -> list[str]:
    disk = disk_of(made)
    lines = [
        f"disk: {size(disk.total)} in the run folder: snapshots {made.config.keep} + the best + one being written of "
        f"{size(disk.snapshot)}, the export {size(disk.export)}, ledger {size(disk.ledger)}; {size(disk.free)} are "
        "free here"
    ]
    if disk.total > disk.free:
        lines.append("  change: --keep 1, or --run FOLDER on a larger disk")
    if made.num_devices > 1:
        lines.append(f"network: {size(wire_bytes(made))} a step between all {made.num_devices} processes")
    return lines


def _time(made: Plan) -> list[str]:
    if made.times is None:
        what = "this CPU" if made.device.kind == "cpu" else made.device.name
        return [
            f"time: not known for {what}" + ("; add --measure (half a minute)" if made.device.kind == "cpu" else "")
        ]
    found, config, device = made.times, made.config, made.device
    step = found.generate_s + found.update_s
    kind = "measured rates" if device.is_measured else "predicted, not measured"
    tick = found.tick
    lines = [
        f"time ({kind}): a step {duration(step)} at most = answers {duration(found.generate_s)} + update "
        f"{duration(found.update_s)}; {found.tokens_per_s:,.0f} tokens/s read and written; {config.steps} steps "
        f"{duration(config.steps * step)}{_evaluations(made)}",
        f"  a tick {1e3 * tick.writing:.3g} ms = products {1e3 * tick.products:.3g} + states, factors and all else "
        f"{1e3 * (tick.others + tick.rest):.3g} + logits {1e3 * tick.head:.3g}",
        f"  from {device.flops / 1e9:,.0f} GFLOP/s and {device.bandwidth / 1e9:,.3g} GB/s",
    ]
    return lines


def _evaluations(made: Plan) -> str:
    if made.evaluation is None:
        return ""
    every, found = made.config.eval_every, made.evaluation.generate_s
    return f", an evaluation of {made.config.eval_size} problems {duration(found)} (every {every} steps)"
