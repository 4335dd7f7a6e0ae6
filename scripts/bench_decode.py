"""Time a decode step: the matrix products alone (the floor), unperturbed, perturbed; in turns, in one run.

    python scripts/bench_decode.py --layers 4 --dim 128 --vocab 64 --rows 256 --rank 1 --threads 1 --steps 20

Prints one JSON line with tokens/s (medians) and the ratios floor/unperturbed (in time) and perturbed/unperturbed (in
tokens/s). A random official-layout model is made in memory if no --model is given.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from bench import given_model, medians_in_turns, peak_bytes, random_model
from torch import Tensor

from rwkv_es.cpu import engine as cpu
from rwkv_es.model import forward as torch_engine
from rwkv_es.model.forward import Model, draw_factors, new_state, perturb
from rwkv_es.model.weights import Weights
from rwkv_es.noise.factors import Noise, select


def main() -> int:
    """Print one JSON line."""
    options = _parse()
    torch.set_num_threads(options.threads)
    model = given_model(options.model) if options.model else random_model(options.layers, options.dim, options.vocab)
    if options.state_dtype == "fp16":
        model = model._replace(state_dtype=torch.float16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.params.items()}
    noise = Noise(0, select(shapes, {"matrices": 1.0}, options.rank)).at(0, 1e-3)
    factors = draw_factors(noise, model, range(-(-options.rows // 2)))
    with ExitStack() as stack:

        def engine(of_factors: Any) -> Any:
            if options.engine == "torch":
                return torch_engine
            return stack.enter_context(cpu.running(model, of_factors, options.threads))

        perturbed = perturb(model, factors, torch.arange(options.rows))
        calls = {
            "floor": floor(model, options.rows, options.threads),
            "unperturbed": decode_step(engine(None), model, Weights(model.params), options.rows),
            "perturbed": decode_step(engine(factors), model, perturbed, options.rows),
        }
        seconds = medians_in_turns(calls, options.steps)
    print(json.dumps(_result(options, seconds)))
    return 0


def decode_step(engine: Any, model: Model, weights: Weights, rows: int) -> Callable[[], Tensor]:
    """Return a call that reads one token per row and takes the likeliest next one."""
    state = new_state(model, rows)
    tokens = torch.arange(rows) % model.arch.n_vocab
    return lambda: engine.logits(weights, engine.forward(weights, model.arch, tokens, state)).argmax(-1)


def floor(model: Model, rows: int, threads: int) -> Callable[[], None]:
    """Return a call that makes the matrix products of a step, and nothing else."""
    matrices = [(w if is_projection(name) else w.t()) for name, w in model.params.items() if is_product(name, w)]
    operands = {m.shape[0]: torch.randn(rows, m.shape[0]) for m in matrices}
    results = {m.shape[1]: torch.empty(rows, m.shape[1]) for m in matrices}

    def products() -> None:
        torch.set_num_threads(threads)
        for matrix in matrices:
            torch.mm(operands[matrix.shape[0]], matrix, out=results[matrix.shape[1]])
        torch.set_num_threads(1)

    return products


def is_product(name: str, weight: Tensor) -> bool:
    """Say whether a step multiplies by this parameter."""
    return weight.dim() == 2 and not name.endswith(("r_k", "emb.weight"))


def is_projection(name: str) -> bool:
    """Say whether a parameter is stored (in, out)."""
    return not name.endswith(".weight")


def _result(options: argparse.Namespace, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        **{f"{name}_tok_s": round(options.rows / value, 1) for name, value in seconds.items()},
        "floor_to_unperturbed": round(seconds["floor"] / seconds["unperturbed"], 3),
        "perturbed_to_unperturbed": round(seconds["unperturbed"] / seconds["perturbed"], 3),
        "peak_bytes": peak_bytes(),
        **vars(options),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a checkpoint instead of a random model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--state-dtype", default="fp32", choices=("fp32", "fp16"))
    parser.add_argument("--engine", default="numba", choices=("numba", "torch"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
