"""Workers that others kill, that fork, and whose children live on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import is_running, wait_until_gone

from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.sheet import Scores
from rwkv_es.system.errors import RewardError
from rwkv_es.task import Problem

TASK = """
import os, queue, signal, subprocess, sys, time
import multiprocessing as mp
from pathlib import Path
from rwkv_es.task import Problem

VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 8, "raw"

def note(name, pid):
    with open(name, "a") as file:
        file.write(f"{pid}\\n")

def times(name):
    return len(Path(name).read_text().split())

def half(x):
    return x / 2

def spawned():
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.map(half, [1.0])[0]

def put(q, value):
    q.put(value)

def killed_at_first():
    note("tried", os.getpid())
    if times("tried") <= int(os.environ["KILLS"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.75

def back_twice():
    os.fork()
    return 0.5

def twice_with_an_error():
    if os.fork() == 0:
        raise KeyError("the child's")
    return 0.25

def in_a_process():
    q = mp.Queue()
    process = mp.Process(target=put, args=(q, 0.5))
    process.start()
    process.join(5)
    return q.get(timeout=1)

def child(own_session):
    note("children", subprocess.Popen(["sleep", "100"], start_new_session=own_session).pid)
    return 1.0

def daemon():
    if (pid := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            note("children", os.getpid())
            time.sleep(100)
        os._exit(0)
    os.waitpid(pid, 0)
    while not Path("children").exists():
        time.sleep(0.01)
    return 1.0

def daemon_and_exit():
    daemon()
    os._exit(3)

def passing():
    for _ in range(20):  # each is nobody's child for a moment
        subprocess.run(["sh", "-c", "sleep 0 &"], check=True)
    time.sleep(0.5)
    return float(sum(Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z" for pid in os.listdir("/proc") if pid.isdigit()
        and Path(f"/proc/{pid}/stat").read_text().split()[3] == str(os.getppid())))

def child_and_hang():
    child(False), child(True)
    3 ** 10 ** 9

ACTIONS = {
    "killed": killed_at_first, "twice": back_twice, "error twice": twice_with_an_error, "process": in_a_process, "spawned": spawned,
    "child": lambda: child(False), "own session": lambda: child(True), "child and hang": child_and_hang,
    "daemon": daemon, "daemon and exit": daemon_and_exit, "passing": passing,
}

def problems(split, data=""):
    return [Problem("q", "1")]

def reward(problem, text):
    return ACTIONS[text]() if text in ACTIONS else float(text)
"""


@pytest.fixture
def task(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    return str(tmp_path / "task.py")


def score(task: str, texts: list[str], timeout_s: float = 5.0) -> Scores:
    with RewardPool(task, "", 1, timeout_s, 1.0) as pool:
        return pool.score([Problem("q", "1")] * len(texts), texts)


@pytest.mark.parametrize(("kills", "reward"), [(1, 0.75), (2, 0.75), (9, 0.0)])
def test_an_answer_whose_worker_is_killed_is_scored_again_before_it_is_given_up(task, monkeypatch, kills, reward):
    monkeypatch.setenv("KILLS", str(kills))
    scores = score(task, ["0.5", "killed", "1"])
    assert (scores.rewards, scores.errors) == ([0.5, reward, 1.0], int(not reward))
    assert reward or "exit code -9" in scores.causes[1]


@pytest.mark.parametrize(("name", "reward"), [("twice", 0.5), ("error twice", 0.25)])
def test_a_reward_that_comes_back_twice_counts_once(task, name, reward):
    assert score(task, ["0", name, "1", name, "0.5"]).rewards == [0.0, reward, 1.0, reward, 0.5]


def test_rewards_may_start_processes(task):
    scores = score(task, ["process", "0.25", "spawned", "process"], timeout_s=60.0)
    assert scores == Scores([0.5, 0.25, 0.5, 0.5], 0, 0, ""), scores.causes


@pytest.mark.parametrize("where", ["child", "own session"])
def test_closing_ends_what_rewards_have_left_behind(task, where):
    assert score(task, [where, "0.5"]).rewards == [1.0, 0.5]
    assert wait_until_gone([int(Path("children").read_text())], 60) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to a process of one's own")
@pytest.mark.parametrize("where", ["daemon", "daemon and exit"])
def test_what_has_left_its_parents_and_session_ends_too(task, where):
    with RewardPool(task, "", 1, 20.0, 1.0) as pool:
        scores = pool.score([Problem("q", "1")], [where])
    assert scores.rewards == [float(where == "daemon")]
    pids = [int(pid) for pid in Path("children").read_text().split()]
    assert pids and wait_until_gone(pids, 30) == [], "it would sleep for 100 s"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_orphans_that_end_are_forgotten(task):
    assert score(task, ["passing"], timeout_s=60.0).rewards == [0.0]


PARENT = """
import sys
from rwkv_es.reward.pool import RewardPool
from rwkv_es.task import Problem
if __name__ == "__main__":
    with RewardPool(sys.argv[1], "", 1, 60.0, 1.0) as pool:
        pool.score([Problem("q", "1")] * 2, sys.argv[2:])
        print("scored", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("texts", [["child", "own session"], ["0", "child and hang"], ["child", "daemon"]])
def test_a_killed_parent_leaves_nothing_that_a_reward_has_started(task, texts, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, "parent.py", task, *texts]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (
            Path("children").exists() and Path("children").read_text().count("\n") == 2
        ):
            time.sleep(0.02)
        children = [int(pid) for pid in Path("children").read_text().split()]
        assert len(children) == 2 and all(map(is_running, children))
        parent.kill()
    assert wait_until_gone(children, 30) == [], "before the hung one's alarm, of 61 s"


def killed_while_starting(tmp_path, num_kills: int) -> str:
    count = f"""
if mp.parent_process():
    note("starts", os.getpid())
    if times("starts") <= {num_kills}:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "task.py").write_text(TASK + count)
    return str(tmp_path / "task.py")


def test_a_worker_that_is_killed_while_starting_is_started_again(task, tmp_path):
    assert score(killed_while_starting(tmp_path, 2), ["0.5"]).rewards == [0.5]


def test_workers_that_are_always_killed_while_starting_end_in_one_sentence(task, tmp_path):
    with pytest.raises(RewardError, match=r"killed while starting, 3 times in a row .exit code -9.") as caught:
        score(killed_while_starting(tmp_path, 9), ["0.5"])
    assert "\n" not in str(caught.value)


def test_a_pool_that_is_torn_down_starts_no_workers(task, monkeypatch):
    started, others = [], multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt), RewardPool(task, "", 2, 5.0, 1.0) as pool:
        start = multiprocessing.context.SpawnProcess.start
        monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", lambda p: (started.append(p), start(p))[1])
        monkeypatch.setattr(pool, "_wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        pool.score([Problem("q", "1")], ["1"])
    assert started == [] and set(multiprocessing.active_children()) <= set(others)


def test_a_script_that_never_closes_its_pool_ends(task, tmp_path):
    (tmp_path / "open.py").write_text(
        "import sys\nfrom rwkv_es.reward.pool import RewardPool\nfrom rwkv_es.task import Problem\n"
        'if __name__ == "__main__":\n    pool = RewardPool(sys.argv[1], "", 1, 5.0, 1.0)\n'
        '    print(pool.score([Problem("q", "1")], ["0.5"]).rewards)\n'
    )
    done = subprocess.run([sys.executable, "open.py", task], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[0.5]\n"


def test_a_worker_killed_from_outside_changes_no_reward(task):
    with RewardPool(task, "", 1, 5.0, 1.0) as pool:
        pool.score([Problem("q", "1")], ["0"])
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        assert pool.score([Problem("q", "1")] * 3, ["0.1", "0.2", "0.3"]) == Scores([0.1, 0.2, 0.3], 0, 0, "")
