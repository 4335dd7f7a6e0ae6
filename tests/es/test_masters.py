import copy

import pytest
import torch
from dense import dense_sum, fitness_of
from test_update import make

from rwkv_es.es import update
from rwkv_es.es.masters import Masters, join, split
from rwkv_es.es.update import Rule, Updater, checksum, gradient


def test_a_bf16_number_and_its_rest_are_the_fp32_number():
    """Of all kinds of bits: both signs, ties, numbers below the normal ones."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    bits[:1000] = (bits[:1000] & ~0xFFFF) | 0x8000
    values = bits.view(torch.float32)
    values = values[values.isfinite() & (values.abs() < 3e38)]
    weights, rest = split(values)
    assert weights.dtype == torch.bfloat16 and rest.dtype == torch.int16
    assert torch.equal(join(weights, rest).view(torch.int32), values.view(torch.int32))
    assert torch.equal(weights.float(), values.bfloat16().float()) or _differ_in_ties_alone(values, weights)


def _differ_in_ties_alone(values, weights):
    differ = weights.float() != values.bfloat16().float()
    return bool(((values.view(torch.int32)[differ] & 0xFFFF) == 0x8000).all())


def test_masters_in_parts_are_those_in_one_piece():
    steps = torch.Generator().manual_seed(1)
    start = torch.randn(40, 24, generator=steps).bfloat16()
    whole, parts = ({"w": start.clone()} for _ in range(2))
    masters = [Masters(whole, ["w"], False), Masters(parts, ["w"], True)]
    for step in range(50):
        rows = (slice(None), slice(8, 24))[step % 2]
        change = 1e-4 * torch.randn(40, 24, generator=steps)[rows]
        for one in masters:
            one.write("w", rows, one.read("w", rows).add_(change))
    assert torch.equal(*(one["w"] for one in masters))
    assert torch.equal(whole["w"], parts["w"]) and not torch.equal(whole["w"], start)


@pytest.fixture
def elsewhere(monkeypatch):
    """A GPU's ways, on a CPU: two products of bf16 numbers, masters in parts."""
    monkeypatch.setattr(update, "_is_elsewhere", lambda device: True)


@pytest.mark.parametrize("num_members", [6, 300])
def test_the_gradient_by_products_of_bf16_numbers(elsewhere, num_members, monkeypatch):
    """Fitness times A keeps 16 bits: errors of 2**-17 of each term."""
    monkeypatch.setattr(update, "_VALUES_ELSEWHERE", 1 << 14)  # several chunks
    _, noise, _ = make(rank=3)
    for name in ("blocks.0.att.key.weight", "blocks.1.att.w1", "blocks.0.ffn.value.weight", "ln_out.bias"):
        expected = dense_sum(noise, name, fitness_of(num_members))
        found = gradient(noise, name, fitness_of(num_members)).double()
        assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("rule", [Rule(), Rule("adam"), Rule(weight_decay=0.5)])
def test_a_snapshot_of_masters_in_parts_continues_with_the_same_bits(elsewhere, rule):
    def moved(updater, noise, seeds):
        for seed in seeds:
            updater.step(noise._replace(step=seed), fitness_of(6, seed), lr=1e-3)

    model, noise, base = make(torch.bfloat16)
    updater = Updater(model, list(noise.targets), rule, base)
    moved(updater, noise, (0, 1))
    saved, state = {n: w.clone() for n, w in updater.weights().items()}, copy.deepcopy(updater.state())
    assert checksum(*updater.exact()) == checksum(saved), "a ledger's line and its snapshot have one checksum"
    assert saved["head.weight"].dtype == torch.float32
    assert not torch.equal(saved["head.weight"], model.params["head.weight"].float())
    other, _, _ = make(torch.bfloat16)
    again = Updater(other, list(noise.targets), rule, base)
    again.load(saved, state)
    assert all(torch.equal(w, other.params[n]) for n, w in model.params.items())
    for one in (updater, again):
        moved(one, noise, (2,))
    assert checksum(*again.exact()) == checksum(*updater.exact()) != checksum(saved)
