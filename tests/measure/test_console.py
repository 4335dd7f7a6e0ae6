"""What a person sees of a run: lines and shortened texts, written out by hand."""

from types import SimpleNamespace

import pytest

from rwkv_es.measure.console import examples, held_out_line, held_out_samples, readable, step_line
from rwkv_es.measure.metrics import StepCounts, held_out
from rwkv_es.task import Problem

STEP = {
    **{"generate_s": 2.0, "score_s": 0.5, "update_s": 0.5, "wait_s": 100.0},
    **{"reward_mean": 0.25, "reward_std_of_members": 0.125, "tokens_per_answer": 33.4},
    **{"tokens_read": 24690.0, "step_rms_per_sigma": 0.0712},
}
COUNTED = StepCounts(answers=4, read=200, sampled=50, stopped=3, errors=1, timeouts=2)


def test_a_step_in_one_line():
    assert step_line(100, 24, STEP) == (
        "step  25/100 [####............] reward 0.250 ± 0.125  33 tokens/answer  12,345 tokens/s  "
        "moved 0.07 sigma  ETA 3:45"  # 75 steps of 3 s: what a process waits for others is not part of its own work
    )


@pytest.mark.parametrize(
    "num_steps, step, seconds, eta",
    [
        (10, 9, 3.0, "0:00"),
        (10, 8, 3.0, "0:03"),
        (10, 0, 6.62, "1:00"),  # 59.58 s: a minute, not "0:60"
        (101, 0, 36.0, "60:00"),
    ],
)
def test_the_time_that_is_left(num_steps, step, seconds, eta):
    line = step_line(num_steps, step, {**STEP, "generate_s": seconds, "score_s": 0.0, "update_s": 0.0})
    assert line.endswith(f"ETA {eta}")


@pytest.mark.parametrize("step, bar", [(0, "#" + "." * 15), (7, "#" * 8 + "." * 8), (15, "#" * 16)])
def test_the_bar_is_full_at_the_last_step(step, bar):
    assert f" {step + 1:>2}/16 [{bar}] " in step_line(16, step, STEP)


def test_an_evaluation_in_one_line_and_a_hint_when_there_is_nothing_to_learn_from():
    found = held_out([1.0, 0.0, 0.5, 0.0], COUNTED)
    line = "held out, after 0 steps: accuracy 25.0%, reward 0.375 on 4 problems, 12 tokens/answer"
    assert held_out_line(0, found) == line
    for alike in ([0.0, 0.0], [1.0, 1.0]):
        assert "doctor" in held_out_line(0, held_out(alike, COUNTED))
        assert "doctor" not in held_out_line(10, held_out(alike, COUNTED))


def shown(prompt, text):
    answers = SimpleNamespace(problems=[Problem(prompt, "")], texts=[text])
    (line,) = examples(answers, SimpleNamespace(rewards=[0.5]))
    return line


def test_an_example_is_one_line_whatever_is_in_the_texts():
    assert shown("2+2?\n", "\x1b[31m4\r\nUser:") == r"  '2+2?\n' -> '\x1b[31m4\r\nUser:': 0.5"
    assert examples(SimpleNamespace(problems=[], texts=[]), SimpleNamespace(rewards=[])) == []


def test_long_texts_keep_both_ends():
    whole = "a" * 80 + "b" * 80
    assert shown("?", whole) == f"  '?' -> '{whole}': 0.5"
    assert shown("?", "a" * 80 + "x" + "b" * 80) == f"  '?' -> '{'a' * 80} ... {'b' * 80}': 0.5"


def answered(rewards):
    count = range(len(rewards))
    answers = SimpleNamespace(
        problems=[Problem(f"q{i}", "") for i in count], texts=[f"t{i}" for i in count], turns_of=lambda place: ()
    )
    return answers, SimpleNamespace(rewards=rewards)


@pytest.mark.parametrize(
    "rewards, kept",
    [
        ([0.5], [("best", 0)]),
        ([0.0, 1.0], [("best", 1), ("worst", 0)]),
        ([0.5, 0.0, 1.0], [("best", 2), ("worst", 1), ("middle", 0)]),
        ([0.5, None, 1.0, 0.25], [("best", 2), ("worst", 1), ("middle", 3)]),
    ],
)
def test_the_best_the_worst_and_a_middle_answer_are_kept_to_read(rewards, kept):
    found = readable(*answered(rewards))
    texts = [{"kind": kind, "prompt": f"q{i}", "completion": f"t{i}", "reward": rewards[i]} for kind, i in kept]
    assert found == texts


def test_of_an_evaluation_the_first_answers_are_kept_so_that_they_can_be_compared_with_later_ones():
    found = held_out_samples(*answered([0.0] * 20))
    assert [sample["prompt"] for sample in found] == [f"q{i}" for i in range(16)]
    assert {sample["kind"] for sample in found} == {"held out"}
