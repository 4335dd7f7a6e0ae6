import argparse
import collections
import itertools
import math
import random
import sys

import pytest
import torch
from places import ROOT

from rwkv_es.task import load_task

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import pretrain_remainder  # noqa: E402
from pretrain_tiny import IGNORE, pack  # noqa: E402
from rwkv7_sequence import init_params  # noqa: E402

OPTIONS = argparse.Namespace(margin=-1.0, slope=3.0)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain_remainder.build_tokenizer()


def test_a_sign_is_a_token_and_every_problem_fits_into_a_row(tokenizer):
    for problem in load_task("remainder_mini").problems("train"):
        text = problem.prompt + problem.answer
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text and len(ids) == len(text) < pretrain_remainder.ROW_LENGTH
    assert tokenizer.token_to_id("<end>") == 0


def test_both_ways_are_taught_after_their_beginning_and_beginnings_in_their_share(tokenizer):
    rng, begun, answers = random.Random(0), collections.Counter(), collections.Counter()
    for _ in range(600):
        (prompt, answer), *beginnings = pretrain_remainder.taught((861, 9), tokenizer, OPTIONS, rng)
        answers[tokenizer.decode(prompt) + tokenizer.decode(answer[:12]), answer[-1]] += 1
        for prompt, answer in beginnings:
            begun[tokenizer.decode(prompt) + tokenizer.decode(answer)] += 1
    assert set(answers) == {("861%9:-861,852,843,", 0), ("861%9:~861,851,841,", 0)}
    assert 0.4 < min(answers.values()) / 600 < 0.5
    share = 1 / (1 + math.exp(1 + 3 * 0.861))  # log-odds -1 - 3 * 861 / 1000: 2.7 %
    assert set(begun) == {"861%9:-", "861%9:~"}
    assert begun["861%9:-"] / 1800 == pytest.approx(share, abs=0.015)  # four standard deviations


def test_short_divisions_are_in_no_split_and_long_ones_in_the_training_split():
    task, rng = load_task("remainder_mini"), random.Random(1)
    train = {(p.meta["number"], p.meta["divisor"]) for p in task.problems("train")}
    test = {(p.meta["number"], p.meta["divisor"]) for p in task.problems("test")}
    short = {pretrain_remainder.drawn(task.problems("train"), 1.0, rng) for _ in range(2000)}
    assert not short & (train | test) and all(5 <= divisor <= 9 for _, divisor in short)
    assert {pretrain_remainder.drawn(task.problems("train"), 0.0, rng) for _ in range(2000)} <= train


def test_the_loss_is_that_of_a_model_that_knows_nothing(tokenizer):
    """A head of zeros: the logarithm of the vocabulary's size, whatever is taught; and only answers are taught."""
    params = init_params(1, 64, 17, 64, 0) | {"head.weight": torch.zeros(17, 64)}
    samples = (
        s for _ in itertools.count() for s in pretrain_remainder.taught((37, 9), tokenizer, OPTIONS, random.Random(0))
    )
    batch = pack(samples, 2, pretrain_remainder.ROW_LENGTH)
    assert batch.tokens.shape == (2, 416)
    assert pretrain_remainder.answer_loss(params, batch).item() == pytest.approx(math.log(17))
    assert (batch.targets[batch.tokens == tokenizer.token_to_id("%")] == IGNORE).all()
