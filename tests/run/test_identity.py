"""A run is known by what it learns from, wherever that lies and whatever process looks."""

import subprocess
import sys

import pytest
from places import ROOT

from rwkv_es.config.options import Config
from rwkv_es.pretrained.tokenizer import load_tokenizer
from rwkv_es.run.identity import contents, without_folders
from rwkv_es.task.task import Generated, Problem, load_task

TASK = """
from rwkv_es.task import Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 4, "raw"
def problems(split, data=""):
    return [Problem("1+1=", "2", {{"n": 1, "tags": {tags}}}), Problem("2+2=", "{last}")]
def reward(problem, text):
    return 1.0
"""


@pytest.fixture(scope="module")
def tokenizer():
    from rwkv_es.pretrained.checkpoint import resolve

    return load_tokenizer("auto", resolve("tiny"), 115)


@pytest.fixture
def found(tmp_path, tokenizer):
    def of(name="own.py", last="4", tags="{'a', 'b', 'c', 'd'}", **options):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(TASK.format(last=last, tags=tags))
        return contents(Config(task=str(path), **options), load_task(str(path)), tokenizer)

    return of


def test_the_place_does_not_count_and_the_content_does(found):
    first = found()
    assert found("elsewhere/own.py") == first
    assert {key for key, value in found(last="5").items() if value != first[key]} == {"problems_sha256", "task_sha256"}
    assert all(first[key] == "" for key in ("reward_sha256", "shots_sha256"))


def test_own_rewards_are_known_by_their_code_and_weight(found, tmp_path):
    (tmp_path / "r.py").write_text("def f(completion): return 1.0\n")
    (tmp_path / "same.py").write_text("def f(completion): return 1.0\n")
    of = {spec: found(reward=str(tmp_path / spec))["reward_sha256"] for spec in ("r.py:f", "same.py:f", "r.py:f=0.5")}
    assert of["r.py:f"] == of["same.py:f"] != of["r.py:f=0.5"]
    (tmp_path / "r.py").write_text("def f(completion): return 2.0\n")
    assert found(reward=str(tmp_path / "r.py:f"))["reward_sha256"] != of["same.py:f"]
    assert found(reward="no.such.module:f")["reward_sha256"], "the name, where there is no text"


def test_shots_are_known_by_their_text(found, tmp_path):
    (tmp_path / "shots.txt").write_text("one")
    first = found(shots=str(tmp_path / "shots.txt"))["shots_sha256"]
    (tmp_path / "shots.txt").write_text("two")
    assert first and found(shots=str(tmp_path / "shots.txt"))["shots_sha256"] not in ("", first)


def test_sets_and_objects_in_a_problem_have_the_same_digest_in_every_process(tmp_path):
    code = (
        "from rwkv_es.run.identity import _digest, _stable\n"
        "class Own: pass\n"
        "meta = {'b': {'x', 'y', 'z', 'w'}, 'a': [1, Own(), {'k': frozenset('pqrs')}]}\n"
        "print(_digest([repr(_stable(meta)).encode()]))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONHASHSEED": seed}, cwd=ROOT
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


def test_problems_made_when_asked_for_are_not_all_made(tokenizer):
    made = []

    def make(i):
        made.append(i)
        return Problem(str(i), str(i))

    task = load_task("copy")
    few = type(task)(**{**task.__dict__, "problems": lambda split: Generated(make, 10**9)})
    contents(Config(task="copy"), few, tokenizer)
    assert 0 < len(made) < 1000


def test_only_paths_lose_their_folders():
    assert without_folders("task", "a/b/own.py=1,./c.py=2") == "own.py=1,c.py=2"
    assert without_folders("system", "Answer in km/h") == "Answer in km/h"
