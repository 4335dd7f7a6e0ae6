"""Train the embedded model in every precision: what is learned, and which share of the entries has moved.

    python scripts/precision_training.py --seeds 5

One run in each precision and with each seed, on the same problems under the same noise. "bf16, rounded to nearest" is
no option of the package: a step that is smaller than half the distance of two bf16 numbers is lost. Needs the extra
`compare`.
"""

import argparse
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

import torch
from compare.race import accuracy, draw
from compare.world import Asked, World, answer, open_world

from rwkv_es import ES, load_model

TARGETS = {"matrices": 1.0, "head.weight": 10.0}
PROBLEMS = 8


class Precision(NamedTuple):
    """How weights are held."""

    dtype: str
    quantize: str = "none"
    master: str = "fp32"
    is_lost: bool = False  # what is rounded off is forgotten


PRECISIONS = {
    "fp32": Precision("fp32"),
    "bf16, fp32 masters (on a GPU: 16 bits of rest, the same numbers)": Precision("bf16"),
    "bf16, rounded stochastically": Precision("bf16", master="stochastic"),
    "bf16, rounded to nearest": Precision("bf16", is_lost=True),
    "int8, rounded stochastically": Precision("fp32", quantize="int8"),
}


def train(world: World, precision: Precision, seed: int, steps: int, lr: float) -> tuple[float, float]:
    """Return the held-out accuracy after the steps, and the share of the targets' entries that is not the base's."""
    model = load_model("tiny", dtype=precision.dtype, quantize=precision.quantize)[0]
    es = ES(model, population=64, sigma=3e-3, lr=lr, targets=TARGETS, seed=seed, master=precision.master)
    before = {name: model.params[name].clone() for name in es.noise.targets}
    for step in range(steps):
        problems = draw(world.train, PROBLEMS, seed, step)
        es.tell(answer(world, Asked(members=es.ask(), model=es.model), problems).rewards)
        for name, held in es.updater.master.held.items() if precision.is_lost else ():
            held.copy_(es.model.params[name])
    own = world._replace(model=es.model)
    moved = torch.cat([(es.model.params[name] != held).flatten() for name, held in before.items()])
    return accuracy(own, es.model.params, world.test[:200]), moved.float().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs in each precision")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = open_world("tiny", "countdown_mini")
    print("| weights | accuracy | entries that moved |\n|---|---|---|")
    for name, precision in PRECISIONS.items():
        runs = [train(world, precision, seed, options.steps, options.lr) for seed in range(options.seeds)]
        reached, moved = zip(*runs)
        print(f"| {name} | {fmean(reached):.1%} ± {pstdev(reached):.1%} | {fmean(moved):.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
