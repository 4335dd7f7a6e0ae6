"""The limits of the options, each with a reward, or an environment, that goes beyond it."""

import os

import pytest

from rwkv_es.cli import main
from rwkv_es.config.options import build
from rwkv_es.session import open_environments, open_scorers, open_session
from rwkv_es.system.errors import RewardError
from rwkv_es.task import Problem

REWARDS = """
import os, sys, time

def slow(completion, answer):
    time.sleep(30)
    return 1.0

def hungry(completion, answer):
    return float(len(bytearray(1 << 29)) == 1 << 29)

def sees(completion, answer):
    return float(os.environ.get("CUDA_VISIBLE_DEVICES") == "0,1")
"""


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "late.py").write_text("import time\ntime.sleep(2)\n" + REWARDS)
    return tmp_path


def score(reward, **options):
    with open_scorers(build({"task": "jsonl", "data": "unread", "reward": str(reward), **options}, "train")) as scorers:
        return scorers.score([Problem("q", "1")], ["1"])


def test_an_import_may_take_as_long_as_the_option_says(rewards):
    with pytest.raises(RewardError, match=r"not ready after 0\.3 s.*raise --reward-import-timeout"):
        score(f"{rewards}/late.py:sees", reward_import_timeout=0.3)
    assert score(f"{rewards}/late.py:sees", reward_import_timeout=120).errors == 0


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="memory is limited on Linux only")
@pytest.mark.parametrize(("limit", "rewarded"), [(0.25, 0.0), (2, 1.0), (0, 1.0)])
def test_a_reward_may_allocate_as_much_as_the_option_says(rewards, limit, rewarded):
    scores = score(f"{rewards}/rewards.py:hungry", reward_memory=limit, reward_timeout=60)
    assert scores.rewards == [rewarded] and scores.errors == 1 - rewarded
    assert ("MemoryError" in scores.first_error and "--reward-memory" in scores.first_error) == (not rewarded)


def test_an_answer_may_take_as_long_as_the_option_says(rewards):
    assert score(f"{rewards}/rewards.py:slow", reward_timeout=0.3, reward_error_limit=1).timeouts == 1


@pytest.mark.parametrize("sees_gpus", [False, True])
def test_gpus_are_hidden_unless_the_option_says_otherwise(rewards, monkeypatch, sees_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert score(f"{rewards}/rewards.py:sees", reward_cuda=sees_gpus).rewards == [float(sees_gpus)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


GAME = """
import os, time
from multiprocessing import parent_process
from rwkv_es.task import Done, Problem

VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 8, "raw"
if parent_process():
    time.sleep(WAIT_S)

def problems(split, data=""):
    return [Problem("q", "")]

def environment(problem):
    text = yield
    return Done({"sees": os.environ.get("CUDA_VISIBLE_DEVICES") == "0", "eats": len(bytearray(1 << 29)) > 0}[text])
"""


def played(folder, text, late=0, **options):
    (folder / "game.py").write_text(GAME.replace("WAIT_S", str(late)))
    config = build({"task": str(folder / "game.py"), "threads": 1, **options}, "train")
    with open_environments(config, open_session(config)) as session:
        session.environments.begin(Problem("q", ""), text)
        while not (said := session.environments.poll(1.0)):
            pass
    return said[0][1]


def test_environments_have_the_same_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert played(tmp_path, "sees").reward == 0 and played(tmp_path, "sees", reward_cuda=True).reward == 1
    with pytest.raises(RewardError, match=r"environments were not ready after 0\.3 s"):
        played(tmp_path, "sees", late=3, reward_import_timeout=0.3)
    if os.uname().sysname == "Linux":
        assert "MemoryError" in played(tmp_path, "eats", reward_memory=0.25).error
        assert played(tmp_path, "eats", reward_memory=0).reward == 1


@pytest.mark.parametrize("option", ["import-timeout=9", "memory=1", "cuda=true"])
def test_limits_do_nothing_without_workers(option, capsys):
    assert main(["eval", "tiny", "--reward-workers=0", f"--reward-{option}"]) == 2
    assert "does nothing without reward workers" in capsys.readouterr().err
