"""Ask and tell: what the members see is what the update collects."""

import pytest
import torch
from strategies import make

from rwkv_es.es.strategy import Step
from rwkv_es.system.errors import CheckpointError, ConfigError

KEY = "blocks.1.att.key.weight"


def applied(members, name, sigma):
    """Return the unit perturbation of every member, written out in float64 from the factors it answered with."""
    a, b = members.factors.a[name].double(), members.factors.b[name].double()
    pairs = torch.einsum("dor,dir->doi", a, b) * (members.factors.scale[name] / sigma)
    return torch.stack([pairs[n // 2] * (1 if n % 2 == 0 else -1) for n in members.ids])


@pytest.mark.parametrize("rank", [1, 3])
def test_tell_moves_the_weights_along_what_ask_gave(rank):
    es = make(rank=rank, fitness="raw")
    before = es.model.params[KEY].clone()
    unit = applied(es.ask(), KEY, 0.01)
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.25, 3.0, -1.0])
    update = es.tell(rewards)
    fitness = rewards.double()  # raw
    expected = 0.1 / 6 * torch.einsum("n,noi->oi", fitness, unit)
    torch.testing.assert_close((es.model.params[KEY] - before).double(), expected, rtol=1e-4, atol=1e-7)
    assert update.reward_mean == pytest.approx(3.75 / 6) and update.step == 0 and es.step == 1


def test_ask_is_pure_and_the_parts_of_a_population_are_the_whole():
    es = make(population=8)
    whole, again, part = es.ask(), es.ask(), es.ask(range(1, 3))
    assert list(whole.ids) == list(range(8)) and list(part.ids) == [2, 3, 4, 5]
    for name in whole.factors.a:
        assert torch.equal(whole.factors.a[name], again.factors.a[name])
        assert torch.equal(whole.factors.a[name][1:3], part.factors.a[name])
        assert torch.equal(whole.factors.b[name][1:3], part.factors.b[name])
    es.tell(torch.zeros(8))
    assert not torch.equal(es.ask().factors.a[KEY], whole.factors.a[KEY]), "the next step has noise of its own"


def test_without_a_signal_the_weights_stay_and_the_step_counts():
    es = make()
    before = es.checksum()
    assert es.tell(torch.ones(6, 4)).step_rms_per_sigma == 0.0
    assert es.checksum() == before and es.step == 1


@pytest.mark.parametrize("sigma_decay, sigmas", [(True, (0.01, 0.0075, 0.005, 0.005)), (False, (0.01,) * 4)])
def test_the_schedule_moves_lr_and_if_asked_sigma(sigma_decay, sigmas):
    es = make(steps=3, schedule="linear", schedule_end=0.5, sigma_decay=sigma_decay)
    seen = []
    for _ in range(4):  # one more than planned
        seen.append((es.sigma, es.lr))
        es.tell(torch.ones(6))
    assert seen == [pytest.approx(pair) for pair in zip(sigmas, (0.1, 0.075, 0.05, 0.05))]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_replay_takes_recorded_steps_again_and_names_the_one_that_differs(optimizer):
    def taken(es):
        for k in range(3):
            update = es.tell(torch.arange(6.0).roll(k))
            yield Step(update.step, [], update.fitness.tolist(), update.sigma, update.lr, 0, 0.0, es.checksum())

    steps = list(taken(make(optimizer=optimizer)))
    es = make(optimizer=optimizer)
    assert [step.step for step in es.replay(steps)] == [0, 1, 2] and es.step == 3
    steps[1] = steps[1]._replace(fitness=[-f for f in steps[1].fitness])
    with pytest.raises(CheckpointError, match="rebuilt for step 1"):
        list(make(optimizer=optimizer).replay(steps))


def test_what_cannot_be_told_or_made_is_refused():
    with pytest.raises(ConfigError, match="all 6 members; got 4"):
        make().tell(torch.zeros(4, 2))
    with pytest.raises(ConfigError, match="even"):
        make(population=5)
    with pytest.raises(ConfigError, match="matches no tensor"):
        make(targets={"nothing": 1.0})


def test_weight_decay_pulls_towards_the_weights_at_the_start():
    pulled, free = make(weight_decay=0.5, fitness="raw"), make(fitness="raw")
    start = free.model.params[KEY].clone()
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.25, 3.0, -1.0])
    for es in (pulled, free):
        es.tell(rewards)
    drift = free.model.params[KEY] - start  # the first step starts without drift: both move alike
    torch.testing.assert_close(pulled.model.params[KEY], free.model.params[KEY])
    pulled.tell(torch.tensor([1e-4, 0.0, 0.0, 0.0, 0.0, 0.0]))  # next to no signal: decay alone
    torch.testing.assert_close(pulled.model.params[KEY] - start, drift * (1 - 0.1 * 0.5), rtol=1e-3, atol=2e-5)


def test_the_distance_from_the_base_is_the_root_mean_square_of_what_moved():
    es = make(targets={"matrices": 1.0, "vectors": 2.0}, base=None, weight_decay=1e-9)
    names = list(es.noise.targets)
    before = {name: es.model.params[name].clone() for name in names}
    assert es.distance() == 0
    es.tell(torch.tensor([0.0, 1.0, 0.5, 0.25, 3.0, -1.0]))
    moved = torch.cat([(es.model.params[name] - before[name]).double().flatten() for name in names])
    assert es.distance() == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4) and es.distance() > 0
