import math

import pytest
import torch

from rwkv_es.es.fitness import SHAPINGS, combine, has_signal, shape

NAN = math.nan


def test_zscore_written_out():
    # Problem means 0.5 and 1; deviations (.5,1),(-.5,-1),(.5,0),(-.5,0): mean square (4*.25 + 2*1)/8 = 0.375.
    rewards = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    expected = [0.75, -0.75, 0.25, -0.25]
    assert shape(rewards, "zscore").tolist() == pytest.approx([e / math.sqrt(0.375) for e in expected])
    assert shape(rewards, "centered").tolist() == pytest.approx(expected)
    assert shape(rewards, "raw").tolist() == pytest.approx([1.5, 0.0, 1.0, 0.5])
    assert shape(rewards, "rank").tolist() == pytest.approx([0.5, -0.5, 1 / 6, -1 / 6])
    assert shape(rewards, "sign").tolist() == [1.0, -1.0, 1.0, -1.0]


def test_ties_share_their_rank_and_tied_pairs_have_no_sign():
    rewards = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    assert shape(rewards, "rank").tolist() == pytest.approx([-0.5, 1 / 6, 1 / 6, 1 / 6])
    assert shape(rewards, "sign").tolist() == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("method", SHAPINGS)
def test_equal_rewards_give_exactly_zero(method):
    # 0.1 is no binary fraction: a mean over 6 members need not give it back.
    rewards = torch.tensor([[0.1, 0.7, NAN]] * 6, dtype=torch.float64)
    assert shape(rewards, method).tolist() == [0.0] * 6


def test_all_rewards_missing_is_no_signal():
    assert shape(torch.full((4, 2), NAN), "zscore").tolist() == [0.0] * 4


def test_a_missing_reward_is_left_out_of_the_means():
    # Problem 0: mean of (1, 0, 0.5) = 0.5, member 3 missing. Problem 1: mean 0.5.
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.5, 0.0], [NAN, 1.0]])
    assert shape(rewards, "centered").tolist() == pytest.approx([0.5, -0.5, -0.25, 0.5])


def test_a_member_without_any_reward_has_no_fitness():
    rewards = torch.tensor([[1.0], [0.0], [NAN], [0.5]])
    assert shape(rewards, "zscore")[2] == 0
    assert shape(rewards, "rank").tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0])


@pytest.mark.parametrize("method", SHAPINGS)
def test_better_members_have_higher_fitness_whatever_the_problem_level(method):
    rewards = torch.tensor([[1.0, 0.3], [0.9, 0.2], [0.5, 0.1], [0.4, 0.0]], dtype=torch.float64)
    fitness = shape(rewards, method)
    assert fitness[0] > fitness[1] and fitness[2] > fitness[3]
    if method != "raw":
        torch.testing.assert_close(shape(rewards + torch.tensor([5.0, -3.0]), method), fitness)


def test_signal_is_told_per_problem():
    rewards = torch.tensor([[1.0, 0.5, NAN, NAN], [0.0, 0.5, 1.0, NAN]])
    assert has_signal(rewards).tolist() == [True, False, False, False]


def test_samples_count_by_their_average_or_by_the_best_one():
    rewards = torch.tensor([[[0.0, 1.0, 0.5], [NAN, NAN, NAN]], [[NAN, -1.0, -2.0], [0.0, 0.0, 0.0]]])
    assert combine(rewards, "mean").nan_to_num(9).tolist() == [[0.5, 9.0], [-1.5, 0.0]]
    assert combine(rewards, "pass").nan_to_num(9).tolist() == [[1.0, 9.0], [-1.0, 0.0]]


@pytest.mark.parametrize(
    ("votes", "rewards", "expected"),
    [
        ("aab", [0.0, 0.0, 1.0], 0.0),
        ("baa", [0.0, 1.0, 1.0], 1.0),
        ("abc", [0.0, 0.0, 1.0], 1 / 3),
        ("aabb", [1.0, 1.0, 0.0, 0.0], 0.5),
        ("aabbc", [1.0, 1.0, 0.0, 0.0, 0.7], 0.5),
        ("aab", [NAN, NAN, 1.0], 1.0),
        ("  b", [0.0, 0.0, 1.0], 1.0),
        ("  ", [0.0, 0.5], 0.25),
        ("aa", [NAN, NAN], NAN),
    ],
)
def test_samples_count_by_what_most_of_them_answer(votes, rewards, expected):
    other = [1.0] * len(rewards)
    rewards = torch.tensor([[rewards], [other]], dtype=torch.float64)
    found = combine(rewards, "maj", [vote.strip() for vote in votes] + ["x"] * len(other))
    assert found[0, 0].item() == pytest.approx(expected, nan_ok=True) and found[1, 0] == 1.0


@pytest.mark.parametrize("num_problems", [3, 8])
def test_members_of_equal_reward_share_their_rank_in_any_population(num_problems):
    """Rewards of tenths, as Countdown's: what is equal is told by whole numbers here."""
    tenths = torch.randint(0, 11, (96, num_problems), generator=torch.Generator().manual_seed(num_problems))
    ranks = shape(tenths.double() / 10, "rank").tolist()
    sums = tenths.sum(1).tolist()
    expected = [(sum(s < own for s in sums) + (sum(s == own for s in sums) - 1) / 2) / 95 - 0.5 for own in sums]
    assert ranks == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tied", [[0.3, 0.1, 0.2], [0.6, 0.0, 0.0], [0.2, 0.3, 0.1]])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equal_sums_in_another_order_are_a_tie(tied, scale):
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point, nor 0.6."""
    rewards = scale * torch.tensor([[0.1, 0.2, 0.3], tied, [0.1, 0.2, 0.4], [0.1, 0.2, 0.3]], dtype=torch.float64)
    assert shape(rewards, "sign").tolist() == [0.0, 0.0, 1.0, -1.0]
    assert shape(rewards, "rank").tolist() == pytest.approx([-1 / 6, -1 / 6, 0.5, -1 / 6])


def test_small_differences_are_none_the_less_differences():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1e-12], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert shape(rewards, "sign").tolist() == [-1.0, 1.0, 0.0, 0.0]
    assert shape(rewards, "rank").tolist() == pytest.approx([-1 / 6, 0.5, -1 / 6, -1 / 6])


def test_missing_rewards_split_no_tie():
    answers = [[0.1, NAN], [NAN, 0.7], [0.1, 0.7], [0.2, 0.8], [0.0, 0.6], [NAN, NAN]]
    rewards = torch.tensor(answers, dtype=torch.float64)
    assert shape(rewards, "rank").tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5, -0.5, 0.0])


@pytest.mark.parametrize("objective", ["mean", "maj"])
def test_the_order_of_samples_makes_no_signal(objective):
    rewards = torch.tensor([[[0.1, 0.2, 0.3]], [[0.3, 0.2, 0.1]], [[0.3, 0.1, 0.2]]], dtype=torch.float64)
    assert not has_signal(combine(rewards, objective, ["same"] * 9)).any()
