import pytest
import torch

from rwkv_es.model.sampler import SamplingParams, sample


def counters(count):
    counter = torch.zeros(count, 4, dtype=torch.int64)
    counter[:, 0] = torch.arange(count)
    return counter


def frequencies(logits, sampling, count=20_000):
    tokens = sample(torch.tensor([logits]).expand(count, -1), sampling, counters(count))
    return torch.bincount(tokens, minlength=len(logits)).double() / count


def test_greedy_takes_the_largest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]])
    assert sample(logits, SamplingParams(), counters(2)).tolist() == [1, 0]


def test_frequencies_are_the_softmax_at_the_temperature():
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.softmax(torch.tensor(logits).double() / 0.7, -1)
    found = frequencies(logits, SamplingParams(temperature=0.7))
    assert (found - expected).abs().max() < 0.015  # 4 standard deviations of 20,000 draws


def test_top_k_keeps_the_k_likeliest():
    found = frequencies([0.0, 1.0, 2.0, -1.0], SamplingParams(temperature=1.0, top_k=2))
    expected = torch.softmax(torch.tensor([1.0, 2.0]).double(), -1)
    assert found[0] == found[3] == 0
    assert (found[1:3] - expected).abs().max() < 0.015


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    # Probabilities .5 .3 .15 .05: .8 needs the first two, .81 a third.
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert (frequencies(logits, SamplingParams(temperature=1.0, top_p=0.79)) > 0).tolist() == [True, True, False, False]
    assert (frequencies(logits, SamplingParams(temperature=1.0, top_p=0.81)) > 0).tolist() == [True, True, True, False]
    assert (frequencies(logits, SamplingParams(temperature=1.0, top_p=1e-9)) > 0).tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_a_row_depends_on_its_logits_and_counter_alone():
    generator = torch.Generator().manual_seed(0)
    logits, counter = torch.randn(40, 50, generator=generator), counters(40)
    sampling = SamplingParams(seed=3, temperature=1.0, top_p=0.9, top_k=20)
    together = sample(logits, sampling, counter)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(sample(logits[order], sampling, counter[order]), together[order])
    alone = torch.cat([sample(logits[i : i + 1], sampling, counter[i : i + 1]) for i in range(40)])
    assert torch.equal(alone, together)
    assert not torch.equal(sample(logits, sampling._replace(seed=4), counter), together)


@pytest.mark.parametrize("logits", [[0.0, float("-inf"), float("-inf")], [200.0, -200.0, 0.0]])
def test_impossible_tokens_are_never_chosen(logits):
    assert frequencies(logits, SamplingParams(temperature=1.0))[1] == 0


def test_a_single_row_is_summed_with_another_one(monkeypatch):
    """A GPU sums one row in another order than several."""
    logits, sampling, seen = torch.randn(1, 9), SamplingParams(temperature=1.0), []
    cumsum = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: seen.append(len(x)) or cumsum(x, dim))
    assert sample(logits, sampling, counters(1)).shape == (1,)
    assert seen == [2]
