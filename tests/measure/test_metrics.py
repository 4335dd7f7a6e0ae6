"""Numbers of a run, against values written out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from rwkv_es.config.objective import objective_of
from rwkv_es.engine.references import Reading, Reference
from rwkv_es.measure import metrics
from rwkv_es.measure.metrics import (
    StepCounts,
    Timer,
    count,
    held_out,
    held_out_by,
    likelihoods,
    ranks_failing,
    summary,
    waits,
)

COUNTED = StepCounts(answers=4, read=200, sampled=50, stopped=3, errors=1, timeouts=2, broken=3)


def test_a_step_in_numbers_leaves_out_what_is_missing():
    nan = math.nan
    rewards = torch.tensor([[1.0, 0.0, 1.0], [nan, 1.0, 1.0], [nan, nan, nan], [0.0, 0.0, 1.0]])  # (N,P)
    assert summary(rewards, COUNTED) == pytest.approx(
        {
            "reward_mean": 5 / 8,
            "reward_std_of_members": math.sqrt(2 / 27),  # of 2/3, 1 and 1/3
            "reward_of_best_member": 1.0,
            "share_of_problems_with_signal": 2 / 3,  # on the third all score alike
            "tokens_read": 200,
            "tokens_per_answer": 12.5,
            "share_stopped": 0.75,
            "reward_errors": 1,
            "reward_timeouts": 2,
            "answers_not_finite": 3,
        }
    )


def test_answers_are_counted():
    completions = [
        SimpleNamespace(tokens=[1, 2, 3], finish="stop"),
        SimpleNamespace(tokens=[], finish="stop"),
        SimpleNamespace(tokens=[1] * 7, finish="length"),
    ]
    answers = SimpleNamespace(rollout=SimpleNamespace(completions=completions, num_read=40), broken=[1], episodes={})
    assert count(answers, SimpleNamespace(errors=1, timeouts=2)) == (3, 40, 10, 2, 1, 2, 1, *[0] * 9)


def test_reference_answers_are_counted_where_the_logits_are_finite():
    """Two members and answers of 3 and 5 tokens after 2 and 1 of a prompt."""
    references = [Reference(tuple(range(5)), 2, 7), Reference(tuple(range(6)), 1, 9)]
    reading = Reading(references, torch.tensor([[-3.0, -5.0], [math.nan, -10.0]], dtype=torch.float64))
    nothing = SimpleNamespace(rollout=SimpleNamespace(completions=[], num_read=0), broken=[], episodes={})
    found = count(nothing, None, reading)
    assert (found.answers, found.read, found.broken, found.references) == (0, 2 * (4 + 5), 1, 4)
    assert likelihoods(found) == pytest.approx({"nats_per_token": 18 / 13, "bits_per_byte": 18 / math.log(2) / 25})
    assert reading.per_token[0].tolist() == [-1.0, -1.0]
    assert likelihoods(COUNTED) == {}


def test_an_evaluation_by_an_objective():
    """Of two problems: rewards 1 and missing; log-likelihoods -4 and -6 of 2 and 6 tokens, 8 and 8 bytes."""
    found = torch.tensor([[1.0, -4.0, 2, 8], [math.nan, -6.0, 6, 8]], dtype=torch.float64)
    both = held_out_by(objective_of("outcome=2,logprob=0.5"), found, COUNTED)
    assert both["eval/reward"] == 2 * 0.5 + 0.5 * (-2 - 1) / 2
    assert both["eval/accuracy"] == 0.5
    assert both["eval/nats_per_token"] == 10 / 8 and both["eval/bits_per_byte"] == pytest.approx(10 / 16 / math.log(2))
    alone = held_out_by(objective_of("logprob"), found, COUNTED)
    assert alone["eval/reward"] == -1.5 and "eval/accuracy" not in alone
    plain = held_out_by(objective_of("mean"), found, COUNTED)
    assert plain["eval/reward"] == 0.5 and "eval/nats_per_token" not in plain


def test_a_missing_reward_counts_as_nothing_in_an_evaluation():
    found = held_out([1.0, None, 0.5, math.nan], COUNTED)
    assert found["eval/reward"] == 0.375 and found["eval/accuracy"] == 0.25 and found["eval/problems"] == 4


def test_each_process_waits_for_the_slowest():
    assert waits([1.0, 3.0, 2.5]) == {"wait_s_of_rank_0": 2.0, "wait_s_of_rank_1": 0.0, "wait_s_of_rank_2": 0.5}
    assert waits([1.0]) == {}


def test_laps_add_up_to_the_total(monkeypatch):
    now = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    timer = Timer()
    timer.lap("generate_s")
    timer.lap("score_s")
    assert timer.laps == {"generate_s": 2.0, "score_s": 0.5} and timer.total_s == 2.5


def test_a_process_in_which_rewards_failed_is_one_that_says_so():
    counters = torch.zeros(4, len(StepCounts._fields))
    counters[1, StepCounts._fields.index("errors")] = 1
    counters[2, StepCounts._fields.index("timeouts")] = 2
    counters[3, StepCounts._fields.index("broken")] = 3  # the reward has not failed there
    assert ranks_failing(counters) == [1, 2]
