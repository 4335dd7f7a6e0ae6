"""Formulas compared by math-verify: the shared cases, and output that hangs it."""

import importlib.util
import json
import time
from dataclasses import replace

import pytest
from places import DATA
from timing import patiently

from rwkv_es.reward.pool import RewardPool
from rwkv_es.system.errors import RewardError, TaskError
from rwkv_es.task import Problem, load_task
from rwkv_es.task.mixture import load_tasks

HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{9!!!!}",
    r"\boxed{\binom{1000000}{500000}}",
    r"\boxed{" + r"\frac{1}{" * 50 + "2" + "}" * 51,
    r"\boxed{\{" + ",".join(map(str, range(2000))) + r"\}}",
    r"\boxed{63**95**96}",
    "63**95**96",
    "9**9**9**9",
    "99999999!",
    r"\boxed{99999999!}",
    r"\boxed{factorial(10**9)}",
    "9" * 5000,
    r"\boxed{" + "9" * 5000 + "}",
    r"\boxed{" + "9" * 290 + "}",
    r"\boxed{10^{10^{10}}}",
    "__import__('os').system('touch PROOF')",
    r"\boxed{__import__('os').system('touch PROOF')}",
    r"$\operatorname{__import__('os').system('touch PROOF')}$",
    r"\boxed{open('PROOF','w')}",
    "(" * 100_000,
    "." * 100_000,
    r"\boxed{" * 15_000,
    "\\frac" * 20_000,
    "$" * 100_000,
    "\ud800\0",
    "\\boxed{\ud800\0}",
    r"\boxed{\infty}",
    r"\boxed{nan}",
    "٢٠٤",
]
HANGING = r"\boxed{\sum_{n=1}^{999} n!^{999}}"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math_verify is not installed; it is the extra math"
)


@pytest.fixture(scope="module")
def pool():
    with RewardPool("math", "", 1, 60.0, 1.0) as pool:
        pool.score([Problem("", "", {"ground_truth": "1"})], ["1"])
        yield pool


@needs_package
def test_every_clear_case_of_the_shared_file_scores_as_it_says(pool):
    file = DATA / "math_cases.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not there; set RWKV_ES_DATA to the folder that holds it")
    cases = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
    clear = [case for case in cases if case["kind"] == "clear"]
    problems = [Problem("", "", {"ground_truth": case["gold"]}) for case in clear]
    scores = pool.score(problems, [case["text"] for case in clear])
    wrong = [case["id"] for case, reward in zip(clear, scores.rewards) if reward != case["expected"]]
    assert len(clear) > 40 and wrong == [] and scores.errors == scores.timeouts == 0
    gold = pool.score(problems, [f" <think>so</think>\\boxed{{{case['gold']}}}" for case in clear])
    assert gold.rewards == [1.0] * len(clear)


@needs_package
def test_hostile_output_scores_zero_within_the_limit_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = Problem("", "", {"ground_truth": "204"})

    def check(limit_s):
        monkeypatch.setattr(
            "rwkv_es.reward.pool.load_tasks", lambda *names: replace(load_tasks(*names), timeout_s=limit_s)
        )
        with RewardPool("math", "", 1, limit_s, 1.0) as pool:
            pool.score([problem], ["1"])
            scores = pool.score([problem] * len(HOSTILE), HOSTILE)
        assert scores.rewards == [0.0] * len(HOSTILE)
        assert scores.timeouts == 0, "caught before it hangs"

    patiently(check, (2.0, 10.0))
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_what_hangs_is_killed_after_two_seconds_whatever_the_options_allow(pool):
    problem = Problem("", "", {"ground_truth": "204"})
    start = time.monotonic()
    scores = pool.score([problem], [HANGING])
    assert scores.rewards == [0.0] and scores.timeouts == 1
    assert 1.9 < time.monotonic() - start < 30.0
    assert pool.score([problem], [r"\boxed{204}"]).rewards == [1.0]


@needs_package
def test_it_is_never_scored_where_it_cannot_be_killed():
    with pytest.raises(RewardError, match="math may hang, so it needs reward_workers of 1 or more"):
        RewardPool("math", "", 0, 5.0, 1.0)


def test_without_the_extra_or_data_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"pip install rwkv-es\[math\]"):
        load_task("math").problems("test")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(TaskError, match="needs --data"):
        load_task("math").problems("test")
