"""Training in an environment of 20 turns: the same bits however it is run, and after any interruption."""

import json
import os
import shutil
import subprocess
import sys
import time

import jobs
import pytest
from jobs import arguments, run_together
from places import ROOT

from rwkv_es.cli import main

GUESS = {
    **{"model": "tiny-guess", "task": "guess_mini", "population": 8, "prompts": 4, "steps": 3, "sigma": 0.02},
    **{"lr": 0.1, "eval_every": 2, "eval_size": 4, "snapshot_every": 1, "reward_workers": 1, "max_new_tokens": 3},
}


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_LOGS", str(tmp_path))
    yield
    jobs.end_all()


def rows(folder, name="ledger.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def results(folder):
    return [(row["checksum"], row["rewards"], row["tokens"]) for row in rows(folder)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert main(arguments(folder, **GUESS)) == 0
    assert len({row["checksum"] for row in rows(folder)}) == 3
    return folder


@pytest.mark.promise
@pytest.mark.parametrize("size, options", [(1, {"slots": 8, "reward_workers": 0}), (2, {"slots": 64})])
def test_any_slots_processes_and_workers_give_the_same_bits(alone, tmp_path, size, options):
    codes, outputs = run_together(size, arguments(tmp_path / "run", **{**GUESS, **options}))
    assert codes == [0] * size, outputs
    assert results(tmp_path / "run") == results(alone)


@pytest.mark.promise
def test_sampled_episodes_too(tmp_path):
    found = []
    for slots in (8, 64):
        options = {**GUESS, "temperature": 1.0, "samples": 2, "slots": slots, "steps": 1, "eval_every": 0}
        assert main(arguments(tmp_path / str(slots), **options)) == 0
        found.append(results(tmp_path / str(slots)))
    assert found[0] == found[1]


@pytest.mark.promise
def test_killed_in_the_midst_of_a_step_it_goes_on_to_the_same_bits(alone, tmp_path):
    """Killed after its first step, at whatever it was doing; the children of its environments end with it."""
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rwkv_es", *arguments(folder, **GUESS)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "ledger.jsonl").is_file() or not rows(folder):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(rows(folder)) < 3
    assert main(arguments(folder, **GUESS)) == 0
    assert results(folder) == results(alone)


def test_metrics_samples_and_report_speak_of_turns(alone):
    metrics = rows(alone, "metrics.jsonl")
    step = next(row for row in metrics if "turns_per_episode" in row)
    assert 10 < step["turns_per_episode"] <= 20 and step["episodes_failed"] == 0
    assert step["tokens_per_episode"] == pytest.approx(4 * step["turns_per_episode"], rel=0.15)
    held_out = next(row for row in metrics if "eval/turns_per_episode" in row)
    assert 0 <= held_out["eval/episodes_cut"] <= 4
    sample = rows(alone, "samples.jsonl")[0]
    assert sample["turns"][0]["reply"] in ("+\n", "-\n", "=\n")
    page = (alone / "report.html").read_text()
    assert json.dumps(sample["completion"])[1:40] in page and "turns_per_episode" in page


def test_eval_says_how_success_grows_with_turns(alone, tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    arguments = ["eval", "--model", "tiny-guess", "--task", "guess_mini", "--eval-size", "40", "--device", "cpu"]
    assert main([*arguments, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])
    within = [result[f"success within {k} turns"] for k in (1, 2, 4, 8, 16)]
    assert within == sorted(within) and within[-1] <= result["accuracy"] and "success within 16 turns" in text
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(line["reward"] >= 1 and len(line["turns"]) <= 16 for line in lines) == round(40 * within[-1])


HARD = """
import os, sys, time
from rwkv_es.task import Done, Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE, TIMEOUT_S, MAX_TURNS = "1", (), 2, "raw", 1.0, 3

def problems(split, data=""):
    return [Problem(f"{i}:", "", {"kind": i % 5}) for i in range(20)]

class environment:
    def __init__(self, problem):
        self.kind, self.turn = problem.meta["kind"], 0

    def reply(self, text):
        self.turn += 1
        if self.turn == 2:
            [lambda: None, lambda: time.sleep(100), lambda: os._exit(1), lambda: 1 / 0, lambda: print("x" * 100000)][
                self.kind
            ]()
        return Done(len(text) / 10) if self.turn == 3 else "+"
"""


def test_what_fails_is_counted_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "hard.py").write_text(HARD)
    options = {"task": tmp_path / "hard.py", "model": "tiny", "prompts": 20, "steps": 2, "eval_every": 0}
    options |= {"reward_workers": 1, "reward_error_limit": 1, "max_new_tokens": 2, "population": 2}
    assert main(arguments(tmp_path / "run", **options)) == 0
    for row in rows(tmp_path / "run", "metrics.jsonl")[:2]:
        each = 8  # of five kinds
        assert (row["reward_errors"], row["reward_timeouts"], row["episodes_failed"]) == (2 * each, each, 3 * each)
    said = capsys.readouterr().err
    assert "24 of 40 answers" in said and "environment" in said


def test_the_doctor_and_the_plan_know_episodes(capsys):
    options = [f"--{name}={GUESS[name]}" for name in ("model", "task", "prompts", "sigma")]
    assert main(["doctor", *options, "--device", "cpu", "--eval-size", "4"]) == 0
    assert main(["train", "--config", "guess", "--dry-run"]) == 0


def test_the_ledger_replays(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "copy")
    assert main(["replay", str(tmp_path / "copy")]) == 0
