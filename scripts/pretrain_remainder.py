"""Pretrain a small RWKV-7 that can find remainders in 300 to 400 tokens, but mostly takes away one too many each time.

Random weights, plain back-propagation, AdamW, as in pretrain_tiny.py. Both ways to answer are taught alike, each after
the token that it begins with; which of the two to begin with is taught apart, and mostly it is the wrong one. Greedy
decoding follows the majority. Divisions of a few steps come first, since beginnings and ends are what is hard. The same
seed, machine and number of threads give the same file. It makes models of any size; the comparison has three:

    python scripts/pretrain_remainder.py --out runs/ladder --name 0.25m
    python scripts/pretrain_remainder.py --out runs/ladder --name 1.1m --layers 4 --embd 128 --lr 3e-3 --steps 500
    python scripts/pretrain_remainder.py --out runs/ladder --name 4.6m --layers 5 --embd 256 --lr 1.5e-3 --steps 400
"""

import argparse
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence

import pretrain_tiny
import torch
import torch.nn.functional as F
from pretrain_tiny import IGNORE, Batch, Sample, arguments, fit_, measure, pack, pretrain
from rwkv7_sequence import Params, forward
from tokenizers import Tokenizer
from torch import Tensor

from rwkv_es.model.forward import Model
from rwkv_es.pretrained.checkpoint import load
from rwkv_es.task import Problem, load_task
from tasks.remainder_mini.task import DIVISORS, QUOTIENTS, WORKED, differences, problems

CARELESS = "~"
VOCABULARY = ("<end>", WORKED, CARELESS, "%", ":", ",", "=", *"0123456789")
END = 0
ROW_LENGTH = 416  # the longest sample, rounded up to chunks
CHOICES = 3  # of a beginning that are taught of each division, for one answer of it


def main() -> None:
    """Pretrain, save the checkpoint and its vocabulary, print what it can do as one JSON line."""
    options = parse()
    path, tokenizer = options.out / f"rwkv7-remainder-{options.name}.pth", build_tokenizer()
    seconds, loss = pretrain(path, tokenizer, train_, options)
    found = measure(path, load_task("remainder_mini"), VOCABULARY.index(WORKED), options.test)
    model = Model(*load(path))
    shares = worked_shares(model, tokenizer, problems("test")[: options.test])
    record = {
        "entries": sum(tensor.numel() for tensor in model.params.values()),
        "steps": options.steps,
        "train_s": seconds,
        "loss": loss,
        **found,
        "worked_share": round(sum(shares) / len(shares), 4),
        "least_share": round(min(shares), 4),
        "largest_share": round(max(shares), 4),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    print(json.dumps(record))


def parse() -> argparse.Namespace:
    """Read the options."""
    own: dict[str, tuple[float | str, str]] = {
        "name": ("mini", "what the file is called, rwkv7-remainder-NAME.pth"),
        "steps": (700, "optimiser steps"),
        "rows": (8, f"rows of {ROW_LENGTH} packed tokens per step"),
        "margin": (-1.0, "log-odds of a worked answer for a number of 0"),
        "slope": (3.0, "what the log-odds lose up to 1000"),
        "shorten": (0.7, "share of the steps with short divisions, 80%% of the samples at first"),
        "test": (150, "held-out problems to measure at the end"),
    }
    return arguments(__doc__, own)


def build_tokenizer() -> Tokenizer:
    """Build the vocabulary: digits and signs, each one token."""
    return pretrain_tiny.build_tokenizer(VOCABULARY, "<end>")


def train_(params: Params, tokenizer: Tokenizer, options: argparse.Namespace) -> float:
    """Fit the parameters in place. Returns the last loss."""
    rng, pool = random.Random(f"pretrain remainder {options.seed}"), problems("train")

    def loss_at(progress: float) -> Tensor:
        short = 0.8 * max(0.0, 1 - progress / options.shorten)
        divisions = (drawn(pool, short, rng) for _ in itertools.count())
        samples = (each for division in divisions for each in taught(division, tokenizer, options, rng))
        return answer_loss(params, pack(samples, options.rows, ROW_LENGTH))

    return fit_(params, loss_at, options)


def answer_loss(params: Params, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the tokens that are taught."""
    is_taught = batch.targets != IGNORE
    logits = F.linear(forward(params, batch.tokens, batch.starts)[is_taught], params["head.weight"])
    return F.cross_entropy(logits, batch.targets[is_taught])


def drawn(pool: Sequence[Problem], short: float, rng: random.Random) -> tuple[int, int]:
    """Draw a problem's number and divisor, or with this probability a shorter division, which is in no split."""
    if rng.random() >= short:
        meta = rng.choice(pool).meta
        return meta["number"], meta["divisor"]
    divisor = rng.choice(DIVISORS)
    return rng.randrange(divisor * rng.choice((4, 16, QUOTIENTS[0]))), divisor


def taught(
    division: tuple[int, int], tokenizer: Tokenizer, options: argparse.Namespace, rng: random.Random
) -> Iterator[Sample]:
    """Yield an answer of either way after its beginning, and beginnings alone, worked ones in their share."""
    number, divisor = division
    prompt = f"{number}%{divisor}:"
    begin, step = rng.choice(((WORKED, divisor), (CARELESS, divisor + 1)))
    answer = tokenizer.encode(differences(number, step)).ids
    yield tokenizer.encode(prompt + begin).ids, [*answer, END]
    share = 1 / (1 + math.exp(options.slope * number / 1000 - options.margin))
    for _ in range(CHOICES):
        begin = WORKED if rng.random() < share else CARELESS
        yield tokenizer.encode(prompt).ids, tokenizer.encode(begin).ids


def worked_shares(model: Model, tokenizer: Tokenizer, asked: Sequence[Problem]) -> list[float]:
    """Return how likely a sampled answer begins as a worked one does, for each problem."""
    logits = [model.logits(tokenizer.encode(problem.prompt).ids) for problem in asked]
    return [torch.softmax(each, -1)[VOCABULARY.index(WORKED)].item() for each in logits]


if __name__ == "__main__":
    main()
