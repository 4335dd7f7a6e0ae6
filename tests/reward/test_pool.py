"""Rewards that hang, throw, exit, eat memory or print without end, each through the pool."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import wait_until_gone
from timing import patiently

from rwkv_es.reward.adapters import Answer
from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.sheet import Scores
from rwkv_es.system.errors import RewardError, TaskError
from rwkv_es.task import Problem, load_task

TIMEOUT_S = 0.6
HOSTILE = """
import ctypes, os, resource, subprocess, sys, threading, time
from multiprocessing import parent_process
from pathlib import Path
from rwkv_es.task import Problem

VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 8, "raw"
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

class Stop(BaseException):
    pass

def hang():
    while True:
        pass

def grandchild():
    child = subprocess.Popen(["sleep", "100"])
    Path("grandchild").write_text(str(child.pid))
    child.wait()

def throw():
    raise KeyError("what was thrown")

def throw_base():
    raise Stop("no Exception")

def leave_behind():
    def hold():
        time.sleep(0.1)
        3 ** 10 ** 9  # lets no other thread run

    threading.Thread(target=hold, daemon=True).start()
    return 1.0

def throw_long():
    raise ValueError("long" * 1000)

def print_much():
    for _ in range(1024):
        print("x" * (1 << 20))
        print("x" * 1024, file=sys.stderr)
    os.system("echo from a child process")
    return 1.0

ACTIONS = {
    "hang": hang,
    "hang in C": lambda: 3 ** 10 ** 9,
    "grandchild": grandchild,
    "throw": throw,
    "throw base": throw_base,
    "throw long": throw_long,
    "leave behind": leave_behind,
    "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "sys.exit": lambda: sys.exit(0),
    "_exit": lambda: os._exit(3),
    "crash": lambda: ctypes.string_at(0),
    "memory": lambda: len(bytearray(6 << 30)),
    "recursion": lambda: (lambda f: f(f))(lambda f: f(f)),
    "print": print_much,
    "nan": lambda: float("nan"),
    "inf": lambda: float("-inf"),
    "huge": lambda: 10 ** 400,
    "word": lambda: "1.0",
    "none": lambda: None,
    "true": lambda: True,
    "pid": lambda: os.getpid(),
}

def problems(split, data=""):
    return [Problem("q", "1")]

def reward(problem, text):
    if text.startswith("sleep "):
        time.sleep(float(text.split()[1]))
    return ACTIONS[text]() if text in ACTIONS else float(text.split()[-1])
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "task.py").write_text(HOSTILE)
    return str(folder)


def score(
    task: str, texts: list[str], workers: int = 1, timeout_s: float = TIMEOUT_S, error_limit: float = 1.0
) -> Scores:
    with RewardPool(task, "", workers, timeout_s, error_limit) as pool:
        return pool.score([Problem("q", "1")] * len(texts), texts)


KILLED = ["hang", "_exit", "hang in C", "crash", "interrupt"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_worker_costs_the_guilty_answer_alone(task, workers):
    texts = ["0.1", "0.2", *[text for i, bad in enumerate(KILLED) for text in (bad, f"0.{i + 3}")]]

    def check(limit_s):
        scores = score(task, texts, workers, limit_s)
        assert scores.rewards == [0.1, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0, 0.5, 0.0, 0.6, 0.0, 0.7]
        assert (scores.errors, scores.timeouts) == (3, 2)
        assert scores.first_error == f"the reward ran over its time limit of {limit_s} s\non the answer 'hang' to 'q'"

    patiently(check)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_exit", "exit code 3"),
        ("crash", f"exit code -{int(signal.SIGSEGV)}"),
        ("throw", "KeyError: 'what was thrown'"),
        ("throw base", "Stop: no Exception"),
        ("sys.exit", "SystemExit: 0"),
        ("memory", "MemoryError"),
        ("recursion", "RecursionError"),
        ("nan", "must be finite, or None (not applicable); got nan"),
        ("inf", "must be finite, or None (not applicable); got -inf"),
        ("huge", "OverflowError"),
        ("word", "must be a number or None (not applicable); got str"),
    ],
)
def test_each_failure_is_counted_and_explained(pool, text, message):
    scores = pool.score([Problem("q", "1")] * 3, ["0.5", text, "1"])
    assert (scores.rewards, scores.errors, scores.timeouts) == ([0.5, 0.0, 1.0], 1, 0)
    assert message in scores.first_error


@pytest.fixture(scope="module")
def pool(task):
    with RewardPool(task, "", 1, 5.0, 1.0) as pool:
        yield pool


def test_what_is_no_failure_is_no_failure(pool):
    scores = pool.score([Problem("q", "1")] * 4, ["none", "true", "-2", "1e-9"])
    assert scores == Scores([None, 1.0, -2.0, 1e-9], 0, 0, "")


def test_of_a_gigabyte_printed_a_few_lines_are_shown(task, capfd):
    assert score(task, ["print", "0.5"], timeout_s=20.0).rewards == [1.0, 0.5]
    out, err = capfd.readouterr()
    assert out == "" and len(err) < 20_000 and set(err) <= set("reward: x\n.0123456789molins")


def test_results_come_in_the_order_of_the_texts_however_long_each_takes(task):
    texts = [f"sleep {0.03 if i % 7 == 0 else 0} {i}" for i in range(60)]
    assert score(task, texts, workers=2, timeout_s=5.0) == Scores([float(i) for i in range(60)], 0, 0, "")


def test_the_time_limit_is_for_one_answer_and_not_for_a_batch(task):
    def check(limit_s):
        assert score(task, [f"sleep {limit_s / 6} 1"] * 8, timeout_s=limit_s) == Scores([1.0] * 8, 0, 0, "")

    patiently(check)


def test_several_workers_share_the_work(task):
    pids: set[float | None] = set()
    with RewardPool(task, "", 2, 5.0, 1.0) as pool:
        while len(pids) < 2:  # until the slower one has started
            pids |= set(pool.score([Problem("q", "1")] * 8, ["pid", "sleep 0.1 0"] * 4).rewards[::2])


def take(pool: RewardPool, texts: list[str], order: list[int] | None = None) -> float:
    """Take answers one by one, as they would be generated. Returns the longest that a call took."""
    longest = 0.0
    for place in order or range(len(texts)):
        start = time.perf_counter()
        pool.submit(place, Answer(Problem("q", "1"), texts[place]))
        pool.poll()
        longest = max(longest, time.perf_counter() - start)
        time.sleep(0.002)
    return longest


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_answers_taken_one_by_one_in_any_order_are_scored_like_a_list(task, workers):
    texts = ["nan" if i == 11 else "throw" if i % 10 == 5 else "none" if i == 7 else f"{i}" for i in range(40)]
    with RewardPool(task, "", workers, 5.0, 1.0) as pool:
        expected = pool.score([Problem("q", "1")] * 40, texts)
        for seed in range(3):
            take(pool, texts, random.Random(seed).sample(range(40), 40))
            scores = pool.gather()
            assert scores._replace(first_error="") == expected._replace(first_error="")
            assert "what was thrown" in scores.first_error, "of the first text, not of the first one that came"
    assert (expected.rewards[39], expected.errors) == (39.0, 5)


def test_a_hanging_reward_does_not_stop_who_hands_answers_over_and_is_replaced_meanwhile(task):
    texts = ["hang", *(f"{i}" for i in range(1, 600))]

    def check(limit_s):
        with RewardPool(task, "", 2, limit_s, 1.0) as pool:
            both = pool.score([Problem("q", "1")] * 2, [f"sleep {limit_s / 2} 0"] * 2)
            assert both.rewards == [0.0, 0.0]  # both are at work
            start = time.perf_counter()
            assert take(pool, texts) < limit_s
            left = max(0.0, limit_s - (time.perf_counter() - start))
            start = time.perf_counter()
            scores = pool.gather()
        assert time.perf_counter() - start < left + limit_s / 2, "the time limit counted from the beginning"
        assert (scores.rewards, scores.timeouts) == ([0.0, *map(float, range(1, 600))], 1)

    patiently(check)


def test_a_worker_that_does_not_read_stops_nobody(task):
    def check(limit_s):
        with RewardPool(task, "", 1, limit_s, 1.0) as pool:
            assert pool.score([Problem("q", "1")], ["leave behind"]).rewards == [1.0]
            time.sleep(0.3)
            assert take(pool, ["x" * 8_000_000 + " 1"]) < limit_s
            assert pool.gather().timeouts == 1
            assert pool.score([Problem("q", "1")], ["x" * 8_000_000 + " 1"]).rewards == [1.0]

    patiently(check)


def test_results_that_nobody_collects_for_long_are_kept(task, monkeypatch):
    monkeypatch.setattr("rwkv_es.reward.process.ORPHAN_S", 0.0)

    def check(limit_s):
        with RewardPool(task, "", 1, limit_s, 1.0) as pool:
            assert pool.score([Problem("q", "1")], ["1"]).rewards == [1.0]
            for place in range(256):  # more than the pipe holds
                pool.submit(place, Answer(Problem("q", "1"), "throw long"))
            pool.poll()
            time.sleep(4 * limit_s / 3)
            scores = pool.gather()
        assert (scores.errors, scores.timeouts) == (256, 0)

    patiently(check, (1.8, 7.2))


def test_too_many_failures_among_answers_that_are_all_scored_already_stop_the_run(task):
    with RewardPool(task, "", 1, 5.0, 0.5) as pool:
        assert pool.score([Problem("q", "1")], ["1"]).rewards == [1.0]
        take(pool, ["throw"] * 16)
        for _ in range(40):
            time.sleep(0.01)
            pool.poll()
        with pytest.raises(RewardError, match="failed on 16 of 16 answers"):
            pool.gather()
        assert pool.score([Problem("q", "1")], ["0.5"]).rewards == [0.5]


def test_nothing_at_all_can_be_scored(task):
    assert score(task, []) == Scores([], 0, 0, "")


def test_a_list_of_another_length_is_refused(task):
    with RewardPool(task, "", 0, 1.0, 1.0) as pool, pytest.raises(ValueError, match="zip"):
        pool.score([Problem("q", "1")], ["1", "2"])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_large_a_share_of_failures_stops_the_run_with_the_first_traceback(task, workers):
    with RewardPool(task, "", workers, 5.0, 0.5) as pool:
        at_the_limit = pool.score([Problem("q", "1")] * 16, ["throw", "1"] * 8)
        assert (at_the_limit.errors, sum(at_the_limit.rewards)) == (8, 8.0)
        with pytest.raises(RewardError, match=r"failed on 9 of 16 answers, 0 .* limit is 50%(.|\n)*'what was thrown'"):
            pool.score([Problem("q", "1")] * 16, ["throw", *["nan"] * 8, *["sleep 0.1 0.25"] * 7])
        assert pool.score([Problem("q", "1")], ["0.5"]).rewards == [0.5]  # and no late answer to what was given up
        assert pool.score([Problem("q", "1")] * 15, ["throw"] * 15).errors == 15


def test_hopeless_hanging_is_given_up_early(task):
    start = time.monotonic()
    with pytest.raises(RewardError, match="failed on 2 of 400 answers, 2 of them out of time"):
        score(task, ["hang"] * 400, timeout_s=0.1, error_limit=0.003)
    assert time.monotonic() - start < 30, "all of them would take 40 seconds"


def test_without_workers_everything_is_scored_here(task):
    assert score(task, ["pid"], workers=0).rewards == [os.getpid()]
    scores = score(task, ["throw", "throw base", "none", "nan", "1"], workers=0)
    assert (scores.rewards, scores.errors) == ([0.0, 0.0, None, 0.0, 1.0], 3)
    with pytest.raises(KeyboardInterrupt):
        score(task, ["interrupt"], workers=0)


def test_a_task_that_does_not_load_is_refused_at_once(tmp_path):
    with pytest.raises(TaskError, match="unknown task 'nothing'"):
        RewardPool("nothing", "", 1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("if parent_process(): raise OSError('not twice')", r"cannot load the task(.|\n)*not twice"),
        ("if parent_process(): os._exit(7)", "while starting .exit code 7."),
    ],
)
def test_a_task_that_does_not_load_in_a_worker_is_refused(tmp_path, line, message):
    (tmp_path / "task.py").write_text(HOSTILE + line)
    with pytest.raises(RewardError, match=message):
        score(str(tmp_path), ["1"])


def test_a_problem_that_cannot_be_sent_is_refused(task):
    with RewardPool(task, "", 1, 5.0, 1.0) as pool:
        with pytest.raises(RewardError, match="cannot be sent"):
            pool.score([Problem("q", "1", {"check": lambda text: 1.0})], ["1"])
        assert pool.score([Problem("q", "1")], ["1"]).rewards == [1.0]


def test_a_worker_that_died_while_idle_is_replaced_and_nothing_is_blamed(task):
    with RewardPool(task, "", 1, 5.0, 1.0) as pool:
        pid = int(pool.score([Problem("q", "1")], ["pid"]).rewards[0])
        os.kill(pid, signal.SIGKILL)
        assert wait_until_gone([pid], 60) == []
        assert pool.score([Problem("q", "1")], ["1"]) == Scores([1.0], 0, 0, "")


def test_closing_leaves_no_process(task):
    before = multiprocessing.active_children()
    with RewardPool(task, "", 2, 5.0, 1.0) as pool:
        assert len(multiprocessing.active_children()) == len(before) + 2
        pool.score([Problem("q", "1")] * 4, ["1"] * 4)
    assert multiprocessing.active_children() == before


def test_what_a_killed_scorer_had_started_is_killed_too(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(limit_s):
        assert score(task, ["grandchild", "1"], timeout_s=limit_s).timeouts == 1

    patiently(check)
    assert wait_until_gone([int(Path("grandchild").read_text())], 60) == []


PARENT = """
import sys
from rwkv_es.reward.pool import RewardPool
from rwkv_es.task import Problem
if __name__ == "__main__":
    pool = RewardPool(sys.argv[1], "", 2, 1.0, 1.0)
    pids = set()
    while len(pids) < 2:
        pids |= {int(pid) for pid in pool.score([Problem("q", "1")] * 8, ["pid", "sleep 0.1 0"] * 4).rewards[::2]}
    print(*pids, flush=True)
    pool.score([Problem("q", "1")], ["hang"])
"""


def test_a_killed_parent_leaves_no_worker_idle_or_hung(task, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script), task], stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.2)
        parent.kill()
    assert wait_until_gone(pids, 60) == []


def test_scoring_short_answers_costs_little():
    task = load_task("countdown")
    problems = [problem for problem in task.problems("train")[:256] for _ in range(8)]
    answers = [problem.answer if i % 2 else "<answer>1+2</answer>" for i, problem in enumerate(problems)]
    with RewardPool("countdown", "", 1, 5.0, 0.5) as pool:
        expected = [1.0 if i % 2 else 0.1 for i in range(2048)]
        seconds = []
        for _ in range(4):  # the quickest one: others use the machine too
            start = time.perf_counter()
            assert pool.score(problems, answers).rewards == expected
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 8  # a millisecond each; waiting 10 ms for each would be 20 s
