"""What fewer bits in the matrix products do to logits, to likelihoods, and to what a step learns from.

    python scripts/precision_error.py                                                  # the embedded model
    python scripts/precision_error.py --model M.pth --tokenizer T.json --text FILE --sigma 0.01

One JSON line for each kind: the logits' error relative to fp32, the bits per byte of texts, how many of the likeliest
tokens are the same, and `signal`: the correlation, with fp32, of the differences between mirrored members' likelihoods.
fp8 is e4m3 with a scale for every row of weights, and of operands where these are fp8 too; sums are fp32.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import linear

from rwkv_es import load_model, load_task
from rwkv_es.model import int8
from rwkv_es.model import weights as weights_module
from rwkv_es.model.forward import Model, draw_factors, forward, logits, new_state, perturb
from rwkv_es.noise.factors import StepNoise
from rwkv_es.noise.targets import select

LARGEST = torch.finfo(torch.float8_e4m3fn).max
Product = Callable[[Tensor, Tensor], Tensor]


class Found(NamedTuple):
    """What texts' tokens look like: logits of the unperturbed model (T,V), likelihoods of each member (N,)."""

    logits: Tensor
    likelihood: Tensor


def in_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply what is rounded to bf16."""
    return (x.bfloat16().float() @ weight.bfloat16().float().t()).bfloat16().float()


def in_int8(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply operands in bf16 by weights of 8 bits, as `--quantize int8` does."""
    held = int8.quantize(weight)
    return (x.bfloat16().float() @ held.values.float().t() * held.scale).bfloat16().float()


def in_fp8_weights(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply operands in bf16 by weights in fp8."""
    return (x.bfloat16().float() @ rounded(weight).t()).bfloat16().float()


def in_fp8(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply both in fp8."""
    return (rounded(x) @ rounded(weight).t()).bfloat16().float()


def rounded(x: Tensor) -> Tensor:
    """Round to fp8, a scale for each row: (S,i)."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


KINDS: dict[str, Product] = {
    "fp32": linear,
    "bf16": in_bf16,
    "int8 weights": in_int8,
    "fp8 weights": in_fp8_weights,
    "fp8 weights and operands": in_fp8,
}


def read(model: Model, texts: Sequence[tuple[list[int], int]], sigma: float, population: int) -> Found:
    """Let the unperturbed model and all members read texts (token ids, and from where on they are to be predicted)."""
    targets = select({name: tuple(w.shape) for name, w in model.params.items()}, {"matrices": 1.0}, 1)
    factors = draw_factors(StepNoise(0, sigma, targets, 0), model, range(population // 2))
    members = perturb(model, factors, torch.arange(-1, population))
    likelihood, found = torch.zeros(population + 1, dtype=torch.float64), []
    for ids, start in texts:
        state = new_state(model, population + 1)
        for t, (token, following) in enumerate(pairwise(ids)):
            x = forward(members, model.arch, torch.full((population + 1,), token), state)
            if t + 1 >= start:
                scores = logits(members, x)
                likelihood += scores.double().log_softmax(-1)[:, following]
                found.append(scores[0])
    return Found(torch.stack(found), likelihood)


def main() -> None:
    """Print one JSON line a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokenizer", default="auto")
    parser.add_argument("--text", default="", help="a text file; without one: answers of countdown_mini")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--sigma", type=float, default=0.003)
    parser.add_argument("--population", type=int, default=64)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, tokenizer=options.tokenizer, dtype="fp32", device="cpu")
    if options.text:
        pieces = Path(options.text).read_text(encoding="utf-8")[: 64 * options.texts]
        written = [("", pieces[i : i + 64]) for i in range(0, len(pieces), 64)]
    else:
        written = [(p.prompt, p.answer) for p in load_task("countdown_mini").problems("test")[: options.texts]]
    texts = [(tokenizer.encode(a) + tokenizer.encode(b), max(len(tokenizer.encode(a)), 1)) for a, b in written]
    num_bytes, exact = sum(len(b.encode()) for _, b in written), None
    for kind, product in KINDS.items():
        with mock.patch.object(weights_module, "product", lambda x, weight, *_, product=product: product(x, weight)):
            found = read(model, texts, options.sigma, options.population)
        exact = exact or found
        pairs = [f.likelihood[1::2] - f.likelihood[2::2] for f in (exact, found)]
        print(
            json.dumps(
                {
                    "products": kind,
                    "logits_error": float((found.logits - exact.logits).norm() / exact.logits.norm()),
                    "bits_per_byte": -float(found.likelihood[0]) / math.log(2) / num_bytes,
                    "same_tokens": float((found.logits.argmax(-1) == exact.logits.argmax(-1)).float().mean()),
                    "signal": float(torch.corrcoef(torch.stack(pairs))[0, 1]),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
