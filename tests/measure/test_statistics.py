"""Numbers about scored answers, against values worked out by hand or published."""

import itertools

import pytest

from rwkv_es.measure.statistics import bootstrap, difference, estimate, mcnemar, pass_at_k, wilson


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),
        (4, 1, 4, 1),
        (5, 2, 3, 9 / 10),
        (8, 0, 8, 0),
        (3, 3, 1, 1),
        (10, 3, 2, 1 - 21 / 45),
    ],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one():
    outcomes = [True, False, False, True, False, False]
    for k in range(1, 7):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    ("right", "size", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, size, low, high):
    assert wilson(right, size) == pytest.approx((low, high), abs=5e-5)
    assert wilson(size - right, size) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("b", "c", "p"),  # 2 * sum of C(b+c, i) for i <= min(b, c), over 2^(b+c)
    [
        (1, 8, 2 * (1 + 9) / 512),
        (8, 1, 2 * (1 + 9) / 512),
        (0, 6, 2 / 64),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (2, 10, 2 * 79 / 4096),
    ],
)
def test_mcnemar_by_hand(b, c, p):
    first = [True] * b + [False] * c + [True, True, False]
    second = [False] * b + [True] * c + [True, True, False]
    assert mcnemar(first, second) == (b, c, pytest.approx(p, abs=1e-15))


def test_the_bootstrap_is_close_to_the_normal_interval_and_repeats():
    values = [0.0, 0.5] * 200  # mean 0.25, standard error 0.25 / sqrt(400)
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx((0.25 - 1.96 * 0.0125, 0.25 + 1.96 * 0.0125), abs=0.003)
    assert bootstrap(values) == (low, high)
    assert bootstrap([0.3] * 7) == pytest.approx((0.3, 0.3))


def test_an_estimate_is_wilsons_for_zeros_and_ones_and_the_bootstraps_else():
    assert estimate([1.0] * 15 + [0.0] * 133) == (15 / 148, *wilson(15, 148))
    values = [0.25, 0.5, 1.0, 0.0]
    assert estimate(values) == (0.4375, *bootstrap(values))
    assert estimate([1.0] * 4)[1] > 0.4, "four of four is no certainty"


def test_a_difference_is_of_the_same_problems():
    first, second = [1.0, 1.0, 0.0, 1.0] * 50, [0.0, 1.0, 0.0, 1.0] * 50
    value, low, high = difference(first, second)  # a quarter gains 1: standard error sqrt(3/16 / 200) = 0.0306
    assert value == 0.25
    assert (low, high) == pytest.approx((0.25 - 0.06, 0.25 + 0.06), abs=0.01)
