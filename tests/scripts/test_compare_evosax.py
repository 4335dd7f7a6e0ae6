"""The strategies of scripts/compare/ reach what evosax's reach; a strategy that is wrong would be noticed."""

import sys

import pytest
from places import ROOT

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries

pytest.importorskip("evosax", reason="needs the extra outside")
pytest.importorskip("cma", reason="needs the extra compare")

import compare_evosax  # noqa: E402
from compare_evosax import SETTINGS, Case, by_evosax, by_ours, rank_sum_p  # noqa: E402

SEEDS = range(8)
RARE = 1e-3  # the least p of 8 runs against 8 is 0.0008


def test_the_rank_sum_is_that_of_the_tables():
    """Eight against eight without overlap: U = 0, z = 32 / sqrt(64 * 17 / 12) = 3.36; p = 0.00078."""
    low, high = [1.0] * 8, [2.0] * 8
    assert rank_sum_p(low, high) == pytest.approx(rank_sum_p(high, low)) == pytest.approx(0.00078, abs=1e-5)
    assert rank_sum_p([1, 3, 5], [3]) == 1


@pytest.mark.parametrize("method", ["ours", "eggroll", "openai_es", "cma_es"])
@pytest.mark.parametrize("function", ["sphere", "rosenbrock"])
def test_both_reach_the_same(method, function):
    case = Case(function, 10, 60)
    theirs = [by_evosax(method, case, seed) for seed in SEEDS]
    assert rank_sum_p([by_ours(method, case, seed) for seed in SEEDS], theirs) > RARE


@pytest.mark.parametrize("method, name", [("ours", "lr"), ("openai_es", "lr"), ("cma_es", "population")])
def test_half_a_setting_is_noticed(method, name, monkeypatch):
    case = Case("sphere", 10, 60)
    theirs = [by_evosax(method, case, seed) for seed in SEEDS]
    monkeypatch.setitem(SETTINGS, method, {**SETTINGS[method], name: SETTINGS[method][name] / 2})
    assert rank_sum_p([by_ours(method, case, seed) for seed in SEEDS], theirs) < RARE


def test_ours_keeps_the_elite_and_evosaxs_does_not():
    """The one difference by design: a generation of evosax's is of mutants alone."""
    case = Case("sphere", 10, 60)
    ours, theirs = ([by("genetic", case, seed) for seed in SEEDS] for by in (by_ours, by_evosax))
    assert rank_sum_p(ours, theirs) < RARE and max(ours) < min(theirs)


def test_every_strategy_that_can_be_put_on_vectors_is_compared():
    from compare.methods import METHODS

    assert METHODS.keys() - compare_evosax.SETTINGS.keys() == {"es_at_scale", "grpo", "dr_grpo", "ppo"}
