"""Pretrain the embedded sister model: a small RWKV-7 that can find hidden numbers by halving but climbs step by step.

Random weights, plain back-propagation, AdamW, as in pretrain_tiny.py and with its vocabulary. Each number of an episode
is sought in one of two ways: mostly by climbing in eights and coming down in ones, at times by halving. Greedy decoding
follows the majority, so that evolution strategies have something to elicit in an environment of 20 turns. It takes
about 6 minutes on one core; the same seed, machine and number of threads give the same file.

    python scripts/pretrain_guess.py --out rwkv_es/tiny
"""

import argparse
import itertools
import json
import math
import random

import torch
import torch.nn.functional as F
from pretrain_tiny import IGNORE, VOCABULARY, Batch, Sample, arguments, build_tokenizer, fit_, pack, pretrain
from rwkv7_sequence import Params, forward
from tokenizers import Tokenizer
from torch import Tensor

from tasks.guess_mini.task import LARGEST_FIRST, MAX_TURNS, NUM_HIDDEN, SPAN, halving

LINE = VOCABULARY.index("\n")
SIGNS = torch.tensor([VOCABULARY.index(sign) for sign in "+-="])
STRIDE = 8  # of the climb


def main() -> None:
    """Pretrain, and save the checkpoint and its vocabulary."""
    options = parse()
    seconds, loss = pretrain(options.out / "rwkv7-tiny-guess.pth", build_tokenizer(), train_, options)
    print(json.dumps({"steps": options.steps, "train_s": seconds, "loss": loss}))


def parse() -> argparse.Namespace:
    """Read the options."""
    own: dict[str, tuple[float, str]] = {
        "rows": (16, "rows of packed tokens per step"),
        "margin": (-0.5, "log-odds of halving for a range from 0 on, reached after 80%% of the steps"),
        "slope": (2.0, "what the log-odds lose up to the last range"),
    }
    return arguments(__doc__, own)


def train_(params: Params, tokenizer: Tokenizer, options: argparse.Namespace) -> float:
    """Fit the parameters in place. Returns the last loss."""
    rng = random.Random(f"pretrain guess {options.seed}")

    def loss_at(progress: float) -> Tensor:
        early = max(0.0, 1 - progress / 0.8)
        return guess_loss(params, pack((draw(tokenizer, early, options, rng) for _ in itertools.count()), options.rows))

    return fit_(params, loss_at, options)


def guess_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the guesses and their line ends: replies are read, not taught."""
    is_reply = torch.isin(batch.targets, SIGNS) | (torch.isin(batch.tokens, SIGNS) & (batch.targets == LINE))
    taught = (batch.targets != IGNORE) & ~is_reply
    logits = F.linear(forward(params, batch.tokens, batch.starts)[taught], params["head.weight"])
    return F.cross_entropy(logits, batch.targets[taught])


def draw(tokenizer: Tokenizer, early: float, options: argparse.Namespace, rng: random.Random) -> Sample:
    """Write an episode; the share of numbers that are sought by halving is 0.8 early on, and falls with the range."""
    first = rng.randint(0, LARGEST_FIRST)
    log_odds = options.margin - options.slope * first / LARGEST_FIRST
    share = 0.8 * early + (1 - early) / (1 + math.exp(-log_odds))
    turns: list[str] = []
    for _ in range(NUM_HIDDEN):
        hidden = rng.randint(first, first + SPAN - 1)
        guesses = halving(first, hidden) if rng.random() < share else climbing(first, hidden)
        turns += [f"{guess}\n{'+' if guess < hidden else '-' if guess > hidden else '='}\n" for guess in guesses]
    return tokenizer.encode(f"{first}:").ids, tokenizer.encode("".join(turns[:MAX_TURNS])).ids


def climbing(first: int, hidden: int) -> list[int]:
    """Return the guesses of a climb in strides that goes down step by step from where it is too high."""
    last = first + SPAN - 1
    stops = [min(first + STRIDE * count - 1, last) for count in range(1, -(-SPAN // STRIDE) + 1)]
    too_high = next(i for i, stop in enumerate(stops) if stop >= hidden)
    return [*stops[:too_high], *range(stops[too_high], hidden - 1, -1)]


if __name__ == "__main__":
    main()
