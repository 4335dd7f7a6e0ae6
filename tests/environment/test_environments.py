"""Environments in processes: slow, hanging, throwing, forking ones cost their own episode."""

import os
import time
from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from rwkv_es.environment.children import Staging
from rwkv_es.environment.play import Cut
from rwkv_es.environment.pool import Environments
from rwkv_es.system.errors import RewardError
from rwkv_es.task import Done, Problem

TASK = """
import os, sys, time
from rwkv_es.task import Done, Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 4, "raw"

def problems(split, data=""):
    return [Problem("1:", "")]

def environment(problem):
    kind, told = problem.meta["kind"], []
    while len(told) < 3:
        told.append((yield " ".join(told) if told else None))
        if len(told) == 2:
            misbehave(kind)
            if kind == "large":
                told[0] = "x" * 1_000_000
    return Done(1.0, f"{' '.join(told)[:20]} {os.getpid()}")

def misbehave(kind):
    if kind == "hang":
        time.sleep(1000)
    if kind == "spin":
        while True:
            pass
    if kind == "raise":
        raise ValueError("nothing")
    if kind == "exit":
        os._exit(3)
    if kind == "slow":
        time.sleep(0.05)
    if kind == "print":
        print("x" * 200_000)
        sys.stderr.write("y" * 200_000)
    if kind == "fork" and os.fork() == 0:
        time.sleep(1000)
    if kind == "fork and return":
        os.fork()
    if kind == "daemon" and os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
"""
KINDS = ["good", "raise", "exit", "print", "fork", "fork and return", "daemon", "large", "slow", "hang"]


@pytest.fixture
def task(tmp_path):
    (tmp_path / "hard.py").write_text(TASK)
    return str(tmp_path / "hard.py")


def play(environments, kinds, seconds=60.0):
    """Give every episode the answers a0, a1, a2. Returns what was said last, and all replies before, by place."""
    numbers = {environments.begin(Problem("1:", "", {"kind": kind}), "a0"): place for place, kind in enumerate(kinds)}
    replies, last, deadline = [[] for _ in kinds], {}, time.monotonic() + seconds
    while len(last) < len(kinds) and time.monotonic() < deadline:
        for number, said in environments.poll(0.2):
            place = numbers[number]
            if said.is_over:
                last[place] = said
            else:
                replies[place].append(said.text)
                environments.answer(number, f"a{len(replies[place])}")
    return last, replies


def descendants_of(text):
    """Count the processes whose command line or parent's mentions a task's file, except those of the system."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += text.encode() in file.read_bytes()
        except OSError:
            continue
    return found


def test_each_failure_costs_its_own_episode_and_no_process_is_left(task, monkeypatch):
    resource_tracker.ensure_running()  # multiprocessing's own, which stays
    mark = f"ENVIRONMENTS_OF={os.getpid()} {time.time()}"
    monkeypatch.setenv("ENVIRONMENTS_OF", mark.partition("=")[2])
    environments = Environments(Staging(task, "", 1.0, 1e9, 2, 1000))
    kinds = KINDS * 12
    last, replies = play(environments, kinds)
    assert descendants_of(mark) > 2  # this process was started without the mark
    environments.close()
    for place, kind in enumerate(kinds):
        said = last[place]
        if kind in ("hang", "raise", "exit"):
            assert said.reward == 0.0 and said.is_timeout == (kind == "hang")
            assert {"hang": "time limit", "raise": "ValueError: nothing", "exit": "ended its process"}[
                kind
            ] in said.cause
            assert replies[place] == ["a0"]
        else:
            assert (said.reward, said.error) == (1.0, "")
            assert replies[place][0] == "a0" and said.text.startswith("a0 a1 a2" if kind != "large" else "xxxx")
            assert len(replies[place][1]) == (1001 if kind == "large" else 5)
    deadline = time.monotonic() + 5
    while descendants_of(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descendants_of(mark) == 0


def test_one_that_computes_forever_is_ended_too(task):
    environments = Environments(Staging(task, "", 0.5, 1e9, 1, 1000))
    last, _ = play(environments, ["spin", "good", "good"])
    environments.close()
    assert [last[place].is_timeout for place in range(3)] == [True, False, False]


def test_replies_may_be_of_classes_that_the_task_alone_knows(tmp_path):
    (tmp_path / "named.py").write_text(
        "import enum\n"
        + TASK.partition("def environment")[0]
        + """
class Word(str, enum.Enum):
    HOT = "hot"

class Text(str):
    def __str__(self):
        return self

    def __getitem__(self, key):
        return self

class Odd(Exception):
    def __str__(self):
        return Text("odd")

def environment(problem):
    yield
    yield Word.HOT
    yield Text("cold")
    if problem.meta["kind"] == "raise":
        raise Odd
    return Done(True, Text("over"))
"""
    )
    environments = Environments(Staging(str(tmp_path / "named.py"), "", 5.0, 1e9, 1, 1000))
    last, replies = play(environments, ["good", "raise"])
    environments.close()
    assert replies == [["hot", "cold"]] * 2
    assert last[0][:3] == ("over", 1.0, True) and last[1].cause.startswith("Odd: odd")


def test_slow_ones_think_side_by_side(task):
    environments = Environments(Staging(task, "", 5.0, 1e9, 1, 1000))
    play(environments, ["good"])
    began = time.monotonic()
    last, _ = play(environments, ["slow"] * 200)
    elapsed = time.monotonic() - began
    environments.close()
    assert all(said.reward == 1.0 for said in last.values())
    assert elapsed < 200 * 0.05 / 2, "one after the other would be 10 s"
    assert len({said.text.split()[-1] for said in last.values()}) > 4, "processes"


def test_quick_ones_are_not_spread_over_many_processes(task):
    environments = Environments(Staging(task, "", 5.0, 1e9, 2, 1000))
    last, _ = play(environments, ["good"] * 300)
    environments.close()
    assert len({said.text.split()[-1] for said in last.values()}) <= 16


def test_the_time_of_an_episode_is_limited_as_a_whole(tmp_path):
    (tmp_path / "slow.py").write_text(
        TASK.replace("if len(told) == 2:", "if True:\n            time.sleep(0.3)\n        if False:")
    )
    environments = Environments(Staging(str(tmp_path / "slow.py"), "", 5.0, 0.5, 1, 1000))
    last, replies = play(environments, ["good"])
    environments.close()
    assert last[0].is_timeout and last[0].reward == 0.0 and len(replies[0]) == 1


def test_what_is_forgotten_is_never_spoken_of(task):
    environments = Environments(Staging(task, "", 5.0, 1e9, 1, 1000))
    first = environments.begin(Problem("", "", {"kind": "good"}), "a0")
    environments.forget(first)
    last, _ = play(environments, ["good"])
    assert last[0].reward == 1.0 and environments.poll(0.2) == []
    environments.close()


def test_a_task_that_cannot_be_loaded_there_is_reported(tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_the_sort")
    environments = Environments(Staging(str(tmp_path / "bad.py"), "", 5.0, 1e9, 1, 1000))
    with pytest.raises(RewardError, match="nothing_of_the_sort"):
        for _ in range(100):
            environments.poll(0.2)
    environments.close()


def test_a_host_that_is_killed_is_replaced_and_every_episode_goes_on(task, capsys):
    """Waiting for a reply or for an answer: the other host hears all answers of those that are not over."""
    environments = Environments(Staging(task, "", 5.0, 1e9, 2, 1000))
    numbers = [environments.begin(Problem("1:", "", {"kind": kind}), "a0") for kind in ("good", "slow", "good")]
    forgotten = environments.begin(Problem("1:", "", {"kind": "good"}), "a0")
    said = {}
    while len(said) < 4:
        said.update(environments.poll(0.2))
    assert {answer.text for answer in said.values()} == {"a0"}
    environments.answer(numbers[0], "a1")
    environments.poll()
    environments.forget(forgotten)
    environments._process.kill()
    environments.answer(numbers[1], "a1")
    said = {}
    while len(said) < 2:
        said.update(environments.poll(0.2))
    environments.answer(numbers[2], "a1")
    while len(said) < 3:
        said.update(environments.poll(0.2))
    assert {number: answer.text for number, answer in said.items()} == dict.fromkeys(numbers, "a0 a1")
    last, _ = play(environments, ["good"] * 5)
    assert [last[place].reward for place in range(5)] == [1.0] * 5
    assert "was killed (signal 9); another one plays its episodes anew" in capsys.readouterr().err
    environments.close()
    assert descendants_of(task) == 0


def test_hosts_that_are_killed_again_and_again_are_reported(task):
    environments = Environments(Staging(task, "", 5.0, 1e9, 1, 1000))
    with pytest.raises(RewardError, match="exit code -9"):
        for _ in range(100):
            environments._process.kill()
            environments.poll(0.2)
    environments.close()


def test_a_problem_that_cannot_be_sent_is_one_sentence(task):
    environments = Environments(Staging(task, "", 5.0, 1e9, 1, 1000))
    environments.begin(Problem("", "", {"kind": lambda: 1}), "a0")
    with pytest.raises(RewardError, match="mind its meta"):
        environments.poll()
    environments.close()


def test_a_python_object_runs_here():
    class Twice:
        def __init__(self, problem):
            self.texts = []

        def reply(self, text):
            self.texts.append(text)
            return Done(1.0, "".join(self.texts)) if len(self.texts) == 3 else "go on"

    environments = Environments(Staging("", "", 5.0, 1e9, 0, 1000), Twice)
    last, replies = play(environments, ["good", "good"])
    environments.close()
    assert Counter(said.text for said in last.values()) == {"a0a1a2": 2} and replies == [["go on"] * 2] * 2


PAYING = """
from rwkv_es.task import Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 4, "raw"

def problems(split, data=""):
    return [Problem("1:", "")]

class environment:
    def __init__(self, problem):
        self.kind, self.texts = problem.meta["kind"], []

    def reply(self, text):
        self.texts.append(text)
        return "go on"

    async def cut(self):
        if self.kind == "hang":
            import time
            time.sleep(1000)
        return 0.25 * len(self.texts)
"""


def test_a_limit_is_told_to_the_environment_which_may_pay_or_hang(tmp_path):
    (tmp_path / "paying.py").write_text(PAYING)
    environments = Environments(Staging(str(tmp_path / "paying.py"), "", 1.0, 1e9, 1, 1000))
    numbers = [environments.begin(Problem("1:", "", {"kind": kind}), "a0") for kind in ("good", "hang")]
    said, deadline = {}, time.monotonic() + 60
    while len(said) < 2 and time.monotonic() < deadline:
        for number, each in environments.poll(0.2):
            if each.is_over:
                said[number] = each
            else:
                environments.answer(number, Cut.CUT)
    environments.close()
    assert (said[numbers[0]].reward, said[numbers[0]].error) == (0.25, "")
    assert said[numbers[1]].is_timeout and said[numbers[1]].reward == 0.0
