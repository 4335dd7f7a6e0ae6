"""Who wins where: GRPO or evolution strategies, by size of the model, length of the answers and memory of the device.

    python scripts/regime.py --gpus rtx4090-24 h100-80

Predicted, not measured: seconds by the roofline of `rwkv-es plan`, bytes in closed form, both methods at their best.
Printed is how many answers ours generates, scores and learns from in the time that GRPO takes for one. Ours is ahead
where that is more than the number of answers that it needs for each of GRPO's: `docs/compare.md` has what was measured.

GRPO holds weights and gradients in bf16, a master copy and two moments in fp32 (16 bytes an entry), and reads one
answer at a time backwards, layer by layer: the layers' inputs are kept, all else of a layer is computed again, logits
are made for a part of the answer at a time. Its rollouts come from the same engine as ours, in the memory that is left.
"""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

from rwkv_es.engine.memory import Load, most_slots, state_bytes, targets_of
from rwkv_es.model.layout import Arch, expected_shapes
from rwkv_es.planning.devices import GPUS, Device
from rwkv_es.planning.speed import Workload, times
from rwkv_es.pretrained.header import SIZES

BYTES_PER_ENTRY = 2 + 2 + 4 + 8  # weight, gradient, master copy, moments
KEPT_MEASURED = 70  # numbers of length C that a layer keeps of a token for the way back, see compare/bytes.activations
PROGRAM = 2_000_000_000  # bytes of a GPU: context, libraries
LOGIT_TOKENS, LOGIT_COPIES = 1024, 3  # tokens whose logits exist at a time; in fp32: they, their gradient, softmax
BACKWARD = 4  # passes over an answer: forwards, forwards again layer by layer, and backwards, which counts twice
OF_PRODUCTS = 0.5  # of the rate that long products reach: what training reaches
PROMPT, GROUP, ROLLOUTS, ANSWERS = 128, 8, 512, 8192  # tokens; answers to a problem; of a step: GRPO's, ours at most
LENGTHS = (256, 1024, 4096, 16384)


class Side(NamedTuple):
    """What a method does on a device."""

    in_flight: int  # 0: it does not fit
    seconds: float  # an answer takes in all


def entries_of(arch: Arch) -> int:
    """Count the weights."""
    return sum(math.prod(shape) for shape in expected_shapes(arch).values())


def grpo_bytes(arch: Arch, length: int) -> int:
    """Return what GRPO holds while it reads one answer backwards, with its prompt."""
    tokens = PROMPT + length
    kept = 2 * tokens * arch.n_embd * (arch.n_layer + KEPT_MEASURED)  # bf16
    logits = 4 * LOGIT_COPIES * min(tokens, LOGIT_TOKENS) * arch.n_vocab
    return PROGRAM + BYTES_PER_ENTRY * entries_of(arch) + kept + logits


def grpo(arch: Arch, device: Device, length: int) -> Side:
    """Return how GRPO does: rollouts in what is left beside weights, gradients and moments, then the way back."""
    load = Load(slots=0, population=2, dtype="bf16", engine="triton", device="cuda", temperature=1.0)
    row = state_bytes(arch, load) + arch.n_vocab * 8
    free = device.memory - PROGRAM - BYTES_PER_ENTRY * entries_of(arch)
    slots = min(ROLLOUTS, free // row)
    if slots < GROUP or grpo_bytes(arch, length) > device.memory:
        return Side(0, math.inf)
    asked = Workload(ROLLOUTS, PROMPT, length, ROLLOUTS)
    targets = targets_of(arch, {"matrices": 1.0}, 1)
    generate = times(arch, targets, load._replace(slots=slots), asked, device).generate_s / ROLLOUTS
    backward = BACKWARD * 2.0 * entries_of(arch) * (PROMPT + length) / (OF_PRODUCTS * device.flops)
    return Side(slots, generate + backward)


def ours(arch: Arch, device: Device, length: int) -> Side:
    """Return how ours does, with eight problems a member and as many members as fill the memory."""
    load = Load(slots=0, population=0, dtype="bf16", engine="triton", device="cuda", card=device.memory)
    targets = targets_of(arch, {"matrices": 1.0}, 1)
    slots, _ = most_slots(device.memory, arch, targets, load, rows_per_member=GROUP)
    slots = min(slots, ANSWERS) // (2 * GROUP) * 2 * GROUP
    if not slots:
        return Side(0, math.inf)
    load = load._replace(slots=slots, population=slots // GROUP)
    found = times(arch, targets, load, Workload(slots, PROMPT, length, GROUP), device)
    return Side(slots, (found.generate_s + found.update_s) / slots)


def cell(arch: Arch, device: Device, length: int) -> str:
    """Say who holds how many answers in flight, and how many of ours there are for one of GRPO's."""
    theirs, own = grpo(arch, device, length), ours(arch, device, length)
    if not own.in_flight:
        return "neither fits"
    if not theirs.in_flight:
        return f"ours alone ({own.in_flight:,})"
    return f"{theirs.seconds / own.seconds:.1f} ({theirs.in_flight:,} : {own.in_flight:,})"


def table(device: Device, sizes: Sequence[str]) -> str:
    """Return a device's map: sizes down, lengths across."""
    lines = [f"| {device.name} | {' | '.join(f'{length:,} tokens' for length in LENGTHS)} |", "|---" * 5 + "|"]
    for size in sizes:
        cells = (cell(SIZES[size], device, length) for length in LENGTHS)
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=["rtx4090-24", "h100-80"], choices=list(GPUS), help="devices")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES), help="sizes")
    options = parser.parse_args(argv)
    print("\n\n".join(table(GPUS[name], options.models) for name in options.gpus))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
