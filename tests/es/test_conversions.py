"""Other projects' learning rates: their update rules written out in numpy, against a step of ours; what the page says."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from places import ROOT

from rwkv_es.es import conversions
from rwkv_es.es.conversions import from_eggroll_vllm, from_es_at_scale, from_hyperscale
from rwkv_es.es.strategy import ES
from rwkv_es.model.forward import Model

NAME, NUM_MEMBERS, NUM_PROBLEMS, SIGMA = "blocks.0.ffn.key.weight", 512, 8, 0.02


def rewards_and_std(agreement):
    """Draw rewards (N,P) that have a part in common; with the deviation of our fitness, worked out from its meaning."""
    generator = np.random.default_rng(0)
    rewards = agreement * generator.normal(size=(NUM_MEMBERS, 1)) + generator.normal(size=(NUM_MEMBERS, NUM_PROBLEMS))
    deviations = rewards - rewards.mean(0)
    return rewards, (deviations.mean(1) / deviations.std()).std()


def step_of_ours(lr, rewards, fitness="zscore"):
    """Take a step. Returns how a matrix moved, and every member's noise of unit variance."""
    params = {NAME: torch.zeros(48, 32), "ln_out.weight": torch.ones(1)}
    es = ES(Model(params, None), population=NUM_MEMBERS, sigma=SIGMA, lr=lr, targets={NAME: 1.0}, fitness=fitness)
    factors = es.ask().factors
    noise = [s * (a @ b.T).double().numpy() for a, b in zip(factors.a[NAME], factors.b[NAME]) for s in (1, -1)]
    es.tell(torch.from_numpy(rewards))
    return params[NAME].double().numpy(), noise


@pytest.mark.parametrize("agreement", [0.0, 3.0])
def test_es_at_scale(agreement):
    rewards, std = rewards_and_std(agreement)
    moved, noise = step_of_ours(from_es_at_scale(5e-4, std), rewards)
    means = rewards.mean(1)
    scores = (means - means.mean()) / means.std()
    expected = 5e-4 / NUM_MEMBERS * sum(z * e for z, e in zip(scores, noise))
    np.testing.assert_allclose(moved, expected, atol=1e-9)  # fp32 sums of numbers of 1e-4


@pytest.mark.parametrize("agreement", [0.0, 3.0])
@pytest.mark.parametrize("is_divided", [True, False])
def test_eggroll_vllm(agreement, is_divided):
    rewards, std = rewards_and_std(agreement)
    lr = from_eggroll_vllm(1e-3, std) if is_divided else from_eggroll_vllm(1e-3)
    moved, noise = step_of_ours(lr, rewards, "zscore" if is_divided else "centered")
    scores = (rewards - rewards.mean(0)).mean(1)
    scores = scores / scores.std() if is_divided else scores
    pairs = zip(scores[::2], scores[1::2], noise[::2])
    expected = 1e-3 / (NUM_MEMBERS * SIGMA) * sum((plus - minus) * SIGMA * e for plus, minus, e in pairs)
    np.testing.assert_allclose(moved, expected, atol=1e-8)


@pytest.mark.parametrize("agreement", [0.0, 3.0])
def test_hyperscale(agreement):
    """Its answers have noise of their own, ours share a member's: the steps are of one size, not equal."""
    rewards, std = rewards_and_std(agreement)
    moved, _ = step_of_ours(from_hyperscale(0.1, SIGMA, NUM_MEMBERS, std), rewards)
    generator, count = np.random.default_rng(1), NUM_MEMBERS * NUM_PROBLEMS
    raw = generator.normal(size=count)
    fitness = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-5)
    total = np.zeros((48, 32))
    for pair in range(count // 2):
        noise = np.outer(generator.normal(size=48), generator.normal(size=32))
        total += (fitness[2 * pair] - fitness[2 * pair + 1]) * SIGMA * noise
    theirs = 0.1 * np.sqrt(count) / count * total
    assert np.sqrt((moved**2).mean()) == pytest.approx(
        np.sqrt((theirs**2).mean()), rel=0.15
    )  # sums of 256 and 2048 pairs
    assert np.sqrt((theirs**2).mean()) == pytest.approx(0.1 * SIGMA, rel=0.1)


def test_the_page_on_porting_has_every_conversion_as_it_is_computed():
    page = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| `([^`|]+)` \| `(from_\w+)` \|$", page, re.MULTILINE)
    functions = {name: value for name, value in vars(conversions).items() if name.startswith("from_")}
    assert {name for _, _, name in rows} == functions.keys() and len(rows) == len(functions)
    known = {"sigma": 0.02, "population": 64, "fitness_std": 0.4}
    for rate, formula, name in rows:
        parameters = inspect.signature(functions[name]).parameters
        assert next(iter(parameters)) == rate
        others = {key: value for key, value in known.items() if key in parameters}
        expected = eval(formula, {"sqrt": math.sqrt, rate: 0.3, **known})
        assert functions[name](0.3, **others) == pytest.approx(expected, rel=1e-12)
