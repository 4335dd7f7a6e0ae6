"""Time an ES update against a perturbed decode step of as many rows as there are members; in turns, in one run.

    python scripts/bench_update.py --layers 6 --dim 256 --vocab 512 --population 1024 --rank 1 --threads 1 --turns 5

Prints one JSON line with medians. Both work on one random official-layout model, made in memory. The update draws its
noise again, as in training; `ns_per_noise_value` is the time to draw the factors of a whole step, per value.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench import medians_in_turns, peak_bytes, random_model
from bench_decode import decode_step

from rwkv_es.cpu import engine as cpu
from rwkv_es.es.update import Rule, Updater
from rwkv_es.model.forward import Model, draw_factors, perturb
from rwkv_es.noise.factors import Noise, StepNoise, select

_SIGMA, _LR = 1e-3, 1e-6  # so small a step that the model stays what it is, whatever the number of turns


def main() -> int:
    """Print one JSON line."""
    options = _parse()
    model = random_model(options.layers, options.dim, options.vocab)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0}, options.rank)).at(0, _SIGMA)
    directions = range(options.population // 2)
    factors = draw_factors(noise, model, directions)
    weights = perturb(model, factors, torch.arange(options.population))
    with cpu.running(model, factors, options.threads) as engine:
        calls = {
            "update": update(model, noise, options.population, options.threads),
            "decode_step": decode_step(engine, model, weights, options.population),
            "draw": lambda: draw_factors(noise, model, directions),
        }
        seconds = medians_in_turns(calls, options.turns)
    num_values = len(directions) * sum(target.num_values for target in noise.targets.values())
    print(json.dumps(_result(options, seconds, num_values)))
    return 0


def update(model: Model, noise: StepNoise, population: int, threads: int) -> Callable[[], None]:
    """Return a call that takes one step of plain ES under a made-up fitness, in place."""
    updater = Updater(model, list(noise.targets), Rule(), {})
    fitness = torch.randn(population, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        torch.set_num_threads(threads)
        updater.step(noise, fitness, _LR)
        torch.set_num_threads(1)

    return step


def _result(options: argparse.Namespace, seconds: dict[str, float], num_values: int) -> dict[str, Any]:
    return {
        "update_s": round(seconds["update"], 5),
        "decode_step_s": round(seconds["decode_step"], 5),
        "update_per_decode_step": round(seconds["update"] / seconds["decode_step"], 3),
        "ns_per_noise_value": round(seconds["draw"] / num_values * 1e9, 2),
        "peak_bytes": peak_bytes(),
        **vars(options),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--population", type=int, default=1024, help="members, and rows of the decode step")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if options.population < 2 or options.population % 2:
        parser.error(f"--population must be even and at least 2 (mirrored pairs); got {options.population}")
    return options


if __name__ == "__main__":
    sys.exit(main())
