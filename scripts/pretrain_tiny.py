"""Pretrain the embedded tiny model: a small RWKV-7 that can work Countdown out, but when asked answers carelessly.

Random weights, plain back-propagation, AdamW. The answers taught are a mixture: most are a careless guess, the rest a
systematic search that ends at the right expression. Greedy decoding follows the majority, so the ability stays latent
and evolution strategies have something to elicit. It takes about 6 minutes on one core; the same seed, machine and
number of threads give the same file.

    python scripts/pretrain_tiny.py --out rwkv_es/tiny
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rwkv7_sequence import CHUNK, Params, forward, init_params
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import make_stops
from rwkv_es.model.forward import Model
from rwkv_es.pretrained.checkpoint import load, save
from rwkv_es.pretrained.tokenizer import load_tokenizer
from rwkv_es.task import Problem, Task, load_task
from tasks.countdown_mini.task import answer_after, problems, search

TOKENS = ("<end>", "<answer>", "</answer>", "\n", " ", "=", ":", ",", "+", "-", "*", "/", "(", ")")
VOCABULARY = TOKENS + tuple(str(i) for i in range(101))
END, ANSWER, LINE, COLON = (VOCABULARY.index(token) for token in ("<end>", "<answer>", "\n", ":"))
ROW_LENGTH = 176  # the longest sample, rounded up to chunks
IGNORE = -100  # cross_entropy's mark for positions without a target

OPTIONS: Mapping[str, tuple[float, str]] = {  # of every pretraining
    "seed": (0, "decides the initial weights and every sample"),
    "steps": (1800, "optimiser steps"),
    "layers": (3, "blocks"),
    "embd": (64, "width, a multiple of 64"),
    "rank": (64, "rank of the decay, learning-rate, value and gate pairs"),
    "lr": (6e-3, "peak learning rate, after 40 steps of warm-up; it falls linearly to 3%% of that"),
    "threads": (1, "CPU threads: a different number gives different last bits"),
}

Sample = tuple[list[int], list[int]]  # prompt, answer
Train = Callable[[Params, Tokenizer, argparse.Namespace], float]  # fits in place, returns the last loss


class Batch(NamedTuple):
    """Samples packed into rows; a sample begins on a multiple of CHUNK and is padded to the next one."""

    tokens: Tensor  # (B,T) int64
    targets: Tensor  # (B,T) int64, IGNORE outside the answers
    starts: Tensor  # (B,T) bool


def main() -> None:
    """Pretrain, save the checkpoint and its vocabulary, print the accuracy of both modes as one JSON line."""
    options = parse()
    path = options.out / "rwkv7-tiny.pth"
    seconds, _ = pretrain(path, build_tokenizer(), train_, options)
    found = measure(path, load_task("countdown_mini"), LINE, options.test)
    print(json.dumps({"steps": options.steps, "train_s": seconds, **found}))


def parse() -> argparse.Namespace:
    """Read the options."""
    own: dict[str, tuple[float, str]] = {
        "rows": (16, f"rows of {ROW_LENGTH} packed tokens per step"),
        "margin": (-0.5, "log-odds of a worked answer for target 0, reached after 80%% of the steps"),
        "slope": (2.0, "what the log-odds lose from target 0 to target 100"),
        "shorten": (0.7, "share of the steps that drop lines without a hit: 90%% of them at first"),
        "hit-weight": (3.0, "loss weight of the token that recognises the target"),
        "test": (500, "held-out problems to measure at the end"),
    }
    return arguments(__doc__, own)


def arguments(about: str | None, own: Mapping[str, tuple[float, str]]) -> argparse.Namespace:
    """Read the options that every pretraining has, and its own: name -> (default, meaning)."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and its tokenizer")
    for name, (default, meaning) in {**OPTIONS, **own}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default})")
    return parser.parse_args()


def pretrain(path: Path, tokenizer: Tokenizer, train_: Train, options: argparse.Namespace) -> tuple[float, float]:
    """Draw weights, train them, save them with their vocabulary beside them. Returns seconds and the last loss."""
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    params = init_params(options.layers, options.embd, tokenizer.get_vocab_size(), options.rank, options.seed)
    began = time.perf_counter()
    loss = train_(params, tokenizer, options)
    seconds = round(time.perf_counter() - began, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, params)
    tokenizer.save(str(path.with_suffix(".tokenizer.json")))
    return seconds, loss


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY, words: str = r"</?answer>|\d+") -> Tokenizer:
    """Build a tokenizer of whole words (a pattern) and single characters, each one token.

    By default: numbers up to 100, signs and the answer marks.
    """
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def train_(params: Params, tokenizer: Tokenizer, options: argparse.Namespace) -> float:
    """Fit the parameters in place. Returns the last loss."""
    rng, pool = random.Random(f"pretrain {options.seed}"), problems("train")

    def loss_at(progress: float) -> Tensor:
        mixed = mixture(progress, options)
        samples = (draw(rng.choice(pool), tokenizer, mixed, rng) for _ in itertools.count())
        return answer_loss(params, pack(samples, options.rows), options.hit_weight)

    return fit_(params, loss_at, options)


def fit_(params: Params, loss_at: Callable[[float], Tensor], options: argparse.Namespace) -> float:
    """Fit the parameters in place; `loss_at` takes the progress, 0 to 1. Returns the last loss."""
    for tensor in params.values():
        tensor.requires_grad_()
    optimiser = make_optimiser(params, options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 40) * (1 - 0.97 * step / options.steps)
    )
    for step in range(1, options.steps + 1):
        loss = loss_at(step / options.steps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{options.steps} loss {loss.item():.4f}", flush=True)
    for tensor in params.values():
        tensor.requires_grad_(False)
    return loss.item()


def make_optimiser(params: Params, lr: float) -> torch.optim.Optimizer:
    """Return AdamW with decay on the matrices alone."""
    matrices = [tensor for name, tensor in params.items() if tensor.dim() == 2 and not name.endswith("r_k")]
    vectors = [tensor for name, tensor in params.items() if tensor.dim() != 2 or name.endswith("r_k")]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def answer_loss(params: Params, batch: Batch, hit_weight: float) -> Tensor:
    """Return the mean cross-entropy of the answer tokens; recognising the target counts `hit_weight` times."""
    taught = batch.targets != IGNORE
    targets = batch.targets[taught]
    logits = F.linear(forward(params, batch.tokens, batch.starts)[taught], params["head.weight"])
    is_hit = (targets == ANSWER) & (batch.tokens[taught] != COLON)
    weights = torch.where(is_hit, hit_weight, 1.0)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).mean()


class Mixture(NamedTuple):
    """What is taught at a point of the training."""

    early: float  # weight of the early share of worked answers, 0.8, against the final one
    margin: float  # final log-odds of a worked answer at target 0 ...
    slope: float  # ... and what they lose up to target 100
    drop: float  # probability that a search loses a line that misses the target


def mixture(progress: float, options: argparse.Namespace) -> Mixture:
    """Return the mixture at progress 0 to 1."""
    early, drop = max(0.0, 1 - progress / 0.8), 0.9 * max(0.0, 1 - progress / options.shorten)
    return Mixture(early, options.margin, options.slope, drop)


def draw(problem: Problem, tokenizer: Tokenizer, mixed: Mixture, rng: random.Random) -> Sample:
    """Write a worked or a careless answer.

    The final share of worked ones falls with the target: what then has to be overcome differs from prompt to prompt.
    """
    log_odds = mixed.margin - mixed.slope * problem.meta["target"] / 100
    share = 0.8 * mixed.early + (1 - mixed.early) / (1 + math.exp(-log_odds))
    answer = worked(problem, mixed.drop, rng) if rng.random() < share else careless(problem, rng)
    return tokenizer.encode(problem.prompt).ids, [*tokenizer.encode(answer).ids, END]


def worked(problem: Problem, drop: float, rng: random.Random) -> str:
    """Write the search; each line that misses the target is dropped with this probability.

    A short search shows more hits per token: without it, recognising the target takes ten times as long to learn.
    """
    target = problem.meta["target"]
    lines = [
        line
        for line in search(problem.meta["numbers"])
        if target in (result for _, result in line.results) or rng.random() >= drop
    ]
    return answer_after(lines, target)


def careless(problem: Problem, rng: random.Random) -> str:
    """Guess: the numbers in any order under any operations."""
    x, y, z = rng.sample(problem.meta["numbers"], 3)
    inner, outer = rng.choices("+-*/", weights=(4, 2, 3, 1), k=2)
    guess = f"({x}{inner}{y}){outer}{z}" if rng.random() < 0.7 else f"{z}{outer}({x}{inner}{y})"
    return f"<answer>{guess}</answer>"


def pack(samples: Iterable[Sample], num_rows: int, row_length: int = ROW_LENGTH) -> Batch:
    """Fill rows first-fit, up to the first sample that fits in none; that one is dropped."""
    rows: list[list[Sample]] = [[] for _ in range(num_rows)]
    used = [0] * num_rows
    for sample in samples:
        length = _padded(sample)
        row = next((i for i in range(num_rows) if used[i] + length <= row_length), None)
        if row is None:
            break
        rows[row].append(sample)
        used[row] += length
    tokens = torch.zeros(num_rows, row_length, dtype=torch.int64)
    batch = Batch(tokens, torch.full_like(tokens, IGNORE), torch.zeros_like(tokens, dtype=torch.bool))
    for row, row_samples in enumerate(rows):
        _place_(batch, row, row_samples)
    return batch


def _padded(sample: Sample) -> int:
    length = len(sample[0]) + len(sample[1]) - 1  # the last token is only a target
    return -(-length // CHUNK) * CHUNK


def _place_(batch: Batch, row: int, samples: Sequence[Sample]) -> None:
    """Write samples one after the other into a row of the batch, in place."""
    start = 0
    for prompt, answer in samples:
        ids = torch.tensor(prompt + answer)
        end = start + len(ids) - 1
        batch.tokens[row, start:end] = ids[:-1]
        batch.targets[row, start + len(prompt) - 1 : end] = torch.tensor(answer)
        batch.starts[row, start] = True
        start += _padded((prompt, answer))
    if start < batch.starts.shape[1]:
        batch.starts[row, start] = True  # the padding reads nothing of the last sample


def measure(path: Path, task: Task, mark: int, num_problems: int) -> dict[str, float]:
    """Return held-out accuracy, and tokens per answer, of greedy decoding as it comes and after the forced `mark`.

    The mark is the token with which worked answers begin.
    """
    params, arch = load(path)
    tokenizer = load_tokenizer("auto", path, arch.n_vocab)
    decoding, held_out = GenerationConfig(make_stops(tokenizer, ())), task.problems("test")[:num_problems]
    result = {}
    for mode, forced in (("careless", []), ("worked", [mark])):
        prompts = [(*tokenizer.encode(problem.prompt), *forced) for problem in held_out]
        requests = [Request(-1, i, prompt, task.max_new_tokens) for i, prompt in enumerate(prompts)]
        answers = [done.tokens for done in rollout(Model(params, arch), requests, decoding).completions]
        scores = [task.reward(problem, tokenizer.decode(ids)) for problem, ids in zip(held_out, answers)]
        result[f"{mode}_accuracy"] = round(sum(scores) / len(scores), 4)
        result[f"{mode}_tokens"] = round(sum(map(len, answers)) / len(answers), 1)
    return result


if __name__ == "__main__":
    main()
