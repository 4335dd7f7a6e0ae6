"""Time the rollout with refilled slots against lockstep batches of as many slots; in turns, in one run.

    python scripts/bench_refill.py --layers 4 --dim 128 --vocab 64 --slots 256 --requests 1024 --longest 64
    python scripts/bench_refill.py --layers 4 --dim 128 --vocab 64 --slots 256 --lengths lengths.txt

Prints one JSON line with generated tokens/s (medians; what is thrown away does not count). Lockstep: the same rollout,
called batch by batch, every row going on until the longest of its batch is over. Compacting: rows that end leave their
batch, and the next batch comes when all are over. The lengths are those of a real run (one
integer per line), or drawn: lognormal, cut at the longest. The random official-layout model is made in memory and is
not perturbed; every prompt is one token.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import medians_in_turns, peak_bytes, random_model

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import Stops
from rwkv_es.model.forward import Model

_MEAN_PER_MAXIMUM = 0.4
_SPREAD = 0.6  # standard deviation of a length's logarithm
_HALVINGS = 40


def main() -> int:
    """Print one JSON line."""
    options = _parse()
    torch.set_num_threads(options.threads)
    model = random_model(options.layers, options.dim, options.vocab)
    lengths = read(options.lengths) if options.lengths else lognormal(options.requests, options.longest)
    requests = [Request(member=-1, problem=i, prompt=(0,), max_new_tokens=length) for i, length in enumerate(lengths)]
    decoding = GenerationConfig(never(options.vocab), slots=options.slots, threads=options.threads)
    batches = [requests[start : start + options.slots] for start in range(0, len(requests), options.slots)]
    calls = {
        "refill": generate(model, [requests], decoding),
        "compacting": generate(model, batches, decoding),
        "lockstep": generate(model, [to_the_longest(batch) for batch in batches], decoding),
    }
    seconds = medians_in_turns(calls, options.turns)
    print(json.dumps(_result(options, seconds, lengths)))
    return 0


def generate(model: Model, batches: Sequence[Sequence[Request]], decoding: GenerationConfig) -> Callable[[], None]:
    """Return a call that generates the completions of one batch after the other, each to its full length."""

    def run() -> None:
        for batch in batches:
            completions = rollout(model, batch, decoding).completions
            assert [len(completion.tokens) for completion in completions] == [
                request.max_new_tokens for request in batch
            ]

    return run


def to_the_longest(batch: Sequence[Request]) -> list[Request]:
    """Let all of a batch generate as many tokens as its longest."""
    longest = max(request.max_new_tokens for request in batch)
    return [request._replace(max_new_tokens=longest) for request in batch]


def never(num_tokens: int) -> Stops:
    """Return stops that no completion meets."""
    return Stops(-1, (), np.zeros(num_tokens, dtype=bool), ())


def read(path: str) -> list[int]:
    """Read the lengths of a real run, one integer per line.

    Raises:
        SystemExit: a line is not a positive integer, or there is none.
    """
    lines = Path(path).read_text(encoding="utf-8").split()
    wrong = [line for line in lines if not line.isdecimal() or int(line) < 1]
    if wrong or not lines:
        sys.exit(f"{path}: each line must hold one length, an integer of at least 1; got {wrong[:1] or 'no line'}")
    return [int(line) for line in lines]


def lognormal(count: int, longest: int) -> list[int]:
    """Draw lengths in 1..longest whose mean is 0.4 of the longest; what would be longer is cut there."""
    multiples = torch.exp(_SPREAD * torch.randn(count, generator=torch.Generator().manual_seed(0)))
    low, high = 0.0, float(longest)
    for _ in range(_HALVINGS):  # the mean of what is cut grows with the median
        median = (low + high) / 2
        lengths = (median * multiples).round().clamp(1, longest)
        is_short = lengths.mean() < _MEAN_PER_MAXIMUM * longest
        low, high = (median, high) if is_short else (low, median)
    return lengths.int().tolist()


def _result(options: argparse.Namespace, seconds: dict[str, float], lengths: Sequence[int]) -> dict[str, Any]:
    return {
        **{f"{name}_tok_s": round(sum(lengths) / value, 1) for name, value in seconds.items()},
        "speedup": round(seconds["lockstep"] / seconds["refill"], 3),
        "speedup_over_compacting": round(seconds["compacting"] / seconds["refill"], 3),
        "mean_length_per_maximum": round(sum(lengths) / len(lengths) / max(lengths), 3),
        "peak_bytes": peak_bytes(),
        **vars(options),
        "requests": len(lengths),
        "longest": max(lengths),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=64)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--lengths", default="", help="a file with one length per line, instead of drawn ones")
    parser.add_argument("--requests", type=int, help="how many lengths are drawn (1024)")
    parser.add_argument("--longest", type=int, help="the longest that is drawn (64)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    if options.lengths and (options.requests or options.longest):
        parser.error("--requests and --longest are of drawn lengths; a file of --lengths has its own")
    options.requests, options.longest = options.requests or 1024, options.longest or 64
    return options


if __name__ == "__main__":
    sys.exit(main())
