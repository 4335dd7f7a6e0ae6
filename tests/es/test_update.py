import copy

import pytest
import torch
from checkpoints import random_params
from dense import dense_sum, fitness_of

from rwkv_es.es.update import Rule, Updater, checksum, gradient, round_stochastically
from rwkv_es.model.forward import Model
from rwkv_es.noise.factors import Noise, hash_key, select
from rwkv_es.pretrained.checkpoint import Arch
from rwkv_es.system.errors import ConfigError

TARGETS = {"matrices": 1.0, "emb.weight": 2.0, "head.weight": 10.0, "vectors": 0.5}


def make(dtype=torch.float32, targets=None, rank=2):
    params = random_params(2, 64, 32, 0, dtype=dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    arch = Arch(2, 64, 1, 64, 32, 256, 8, 8, 8, 8)
    noise = Noise(0, select(shapes, targets or TARGETS, rank))
    return Model({k: v.clone() for k, v in params.items()}, arch), noise.at(4, sigma=0.01), params


@pytest.mark.parametrize("num_members", [6, 300])  # 300 members: more than one chunk of directions
def test_gradient_is_the_dense_sum_for_every_target(num_members):
    _, noise, _ = make()
    fitness = fitness_of(num_members)
    names = list(noise.targets) if num_members == 6 else ["blocks.0.att.key.weight", "blocks.1.att.w1", "ln_out.bias"]
    for name in names:
        torch.testing.assert_close(
            gradient(noise, name, fitness).double(), dense_sum(noise, name, fitness), rtol=1e-5, atol=1e-6
        )


def test_sgd_moves_each_target_by_lr_times_its_multiplier_times_the_sum_and_nothing_else():
    model, noise, before = make()
    fitness = fitness_of(6)
    reported = Updater(model, list(noise.targets), Rule(), before).step(noise, fitness, lr=0.1)
    for name, weight in model.params.items():
        if name not in noise.targets:
            assert torch.equal(weight, before[name]), name
            continue
        multiplier = noise.targets[name].multiplier
        step = 0.1 * multiplier * dense_sum(noise, name, fitness).reshape(weight.shape)
        torch.testing.assert_close((weight - before[name]).double(), step, rtol=1e-3, atol=1e-6)
        assert reported[name] == pytest.approx(step.square().mean().sqrt().item() / (0.01 * multiplier), rel=1e-3)
    assert {"blocks.0.att.v1", "blocks.0.att.v0"}.isdisjoint(noise.targets)


def test_mirrored_members_of_equal_fitness_cancel_exactly():
    _, noise, _ = make()
    equal = torch.tensor([0.7, 0.7, -0.3, -0.3], dtype=torch.float64)
    assert gradient(noise, "head.weight", equal).abs().max() == 0


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_optimisers_are_torch_optim_on_the_es_gradient(optimizer):
    model, noise, before = make(targets={"head.weight": 1.0})
    updater = Updater(model, ["head.weight"], Rule(optimizer, momentum=0.8), before)
    parameter = torch.nn.Parameter(before["head.weight"].clone())
    own = {"momentum": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    options = {"momentum": {"momentum": 0.8}, "adam": {"betas": (0.8, 0.999)}}[optimizer]
    reference = own([parameter], lr=0.1, **options)
    for seed in range(3):
        fitness = fitness_of(6, seed)
        updater.step(noise, fitness, lr=0.1)
        parameter.grad = -dense_sum(noise, "head.weight", fitness).float()
        reference.step()
    torch.testing.assert_close(model.params["head.weight"], parameter.data, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [Rule("momentum"), Rule("adam"), Rule("adam", master="stochastic"), Rule(weight_decay=0.5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_continues_with_the_same_bits(rule, dtype):
    def steps(updater, noise, seeds):
        for seed in seeds:
            updater.step(noise._replace(step=seed), fitness_of(6, seed), lr=0.01)

    model, noise, base = make(dtype)
    updater = Updater(model, list(noise.targets), rule, base)
    steps(updater, noise, [0, 1])
    saved = {name: weight.clone() for name, weight in updater.weights().items()}
    state = copy.deepcopy(updater.state())  # as a file would hold it
    steps(updater, noise, [2, 3])

    again, _, _ = make(dtype)
    other = Updater(again, list(noise.targets), rule, base)
    other.load(saved, state)
    steps(other, noise, [2, 3])
    assert checksum(other.weights()) == checksum(updater.weights())
    assert all(torch.equal(again.params[name], weight) for name, weight in model.params.items())


def test_anchored_decay_pulls_towards_the_base():
    model, noise, base = make(targets={"head.weight": 1.0})
    model.params["head.weight"].add_(1.0)
    Updater(model, ["head.weight"], Rule(weight_decay=0.5), base).step(noise, torch.zeros(4), lr=0.1)
    torch.testing.assert_close(model.params["head.weight"] - base["head.weight"], torch.full((32, 64), 0.95))


@pytest.mark.parametrize("master", ["fp32", "stochastic"])
def test_bf16_steps_below_an_ulp_add_up(master):
    model, noise, base = make(torch.bfloat16, targets={"head.weight": 1.0})
    model.params["head.weight"].fill_(1.0)
    updater = Updater(model, ["head.weight"], Rule(master=master), base)
    fitness, moved = fitness_of(6), torch.zeros(32, 64, dtype=torch.float64)
    for step in range(100):  # one moves an entry by about 0.001; bf16 has nothing between 1 and 1.0078
        updater.step(noise._replace(step=step), fitness, lr=3e-3)
        moved += 3e-3 * dense_sum(noise._replace(step=step), "head.weight", fitness)
    found = model.params["head.weight"].double() - 1
    slope = (found * moved).sum() / moved.square().sum()  # plain rounding gives about 0
    assert slope.item() == pytest.approx(1, abs=0.15)


def test_stochastic_rounding_is_unbiased_replays_and_keeps_what_is_exact():
    key = hash_key("test")
    values = torch.full((40_000,), 1 + 2**-7 * 0.3)
    rounded = round_stochastically(values, key, step=5).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert ((rounded - 1) * 2**7).mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(rounded, round_stochastically(values, key, step=5).float())
    assert not torch.equal(rounded, round_stochastically(values, key, step=6).float())
    assert torch.equal(round_stochastically(-values, key, step=5).float(), -rounded)
    exact = torch.tensor([0.0, 1.5, -2.0, 3.0e38])
    assert torch.equal(round_stochastically(exact.bfloat16().float(), key, 0), exact.bfloat16())


def test_stochastic_rounding_does_not_depend_on_the_chunk_or_on_who_computes_it(monkeypatch):
    values, key = torch.randn(1000, generator=torch.Generator().manual_seed(0)), hash_key("test")
    whole = round_stochastically(values, key, 1)
    assert torch.equal(round_stochastically(values[400:], key, 1, first=400), whole[400:])
    monkeypatch.setattr("rwkv_es.es.update.round_to_bf16", None)  # the same by torch
    monkeypatch.setattr("rwkv_es.es.update._ENTRIES_PER_CHUNK", 64)
    assert torch.equal(round_stochastically(values, key, 1), whole)
    assert torch.equal(round_stochastically(values[400:], key, 1, first=400), whole[400:])


def test_a_step_that_is_not_finite_is_refused():
    model, noise, base = make(targets={"head.weight": 1.0})
    with pytest.raises(ConfigError, match=r"head\.weight.*lower lr"):
        Updater(model, ["head.weight"], Rule(), base).step(noise, fitness_of(4) * 1e30, lr=1e30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_sees_every_bit_and_every_place(dtype):
    model, _, _ = make(dtype)
    first = checksum(model.params)
    weight = model.params["blocks.1.ffn.key.weight"]
    weight[3, 5], weight[3, 6] = weight[3, 6].clone(), weight[3, 5].clone()
    swapped = checksum(model.params)
    bits = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[200, 1] ^= 1
    assert len({first, swapped, checksum(model.params)}) == 3
