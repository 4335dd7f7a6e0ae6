"""Several evaluation sets at once, and several answers to each of their problems, while training and in eval."""

import json
import math

import jobs
import pytest
import small_runs

from rwkv_es import evaluate, load_task
from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.measure.page import page
from rwkv_es.model.weights import BASE
from rwkv_es.run.ledger import best_weights
from rwkv_es.session import answer, open_session
from rwkv_es.system.errors import TaskError
from rwkv_es.task import Problem
from rwkv_es.task.mixture import load_tasks

NAMES = ["sums", "countdown_mini"]
SUMS = """
from rwkv_es.task import Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (",",), 8, "raw"

def problems(split, data=""):
    return [Problem(f":{i}+{i + (split == 'test')}=", str(2 * i + (split == "test"))) for i in range(1, 9)]

def reward(problem, text):
    return float(text == problem.answer) / 2 + 0.5 * (text != "")
"""


@pytest.fixture
def sets(tmp_path):
    """Two evaluation sets of tasks that ask and end in different ways."""
    (tmp_path / "sums.py").write_text(SUMS)
    return f"{tmp_path}/sums.py,countdown_mini"


FEW = {"max_new_tokens": 12, "eval_size": 4, "steps": 2, "eval_every": 1}


def write(file, rows):
    file.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows))
    return str(file)


def evaluations(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/reward" in row]


def test_each_set_is_named_in_lines_metrics_samples_and_report_and_the_first_one_decides(tmp_path, capsys, sets):
    """Here a reward of the options scores the set of the task that trains, and the other task scores its own."""
    (tmp_path / "rewards.py").write_text("def length(completion, answer): return len(completion) / 100")
    names = NAMES[::-1]
    options = {**FEW, "eval_sets": ",".join(reversed(sets.split(","))), "reward": f"{tmp_path}/rewards.py:length"}
    small_runs.run(tmp_path / "run", **options)
    rows = evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        for name in ("reward", "accuracy", "problems", "tokens_per_answer"):
            assert row[f"eval/{name}"] == row[f"eval/countdown_mini/{name}"]
        assert row["eval/sums/problems"] == row["eval/countdown_mini/problems"] == 4
        assert 0.01 <= row["eval/countdown_mini/reward"] < 0.4 and row["eval/sums/reward"] * 8 in (4, 5, 6, 7, 8)
    assert best_weights(tmp_path / "run").score == max(row["eval/countdown_mini/reward"] for row in rows)
    out = capsys.readouterr().out
    for step, row in enumerate(rows):
        for name in names:
            right, reward = row[f"eval/{name}/accuracy"], row[f"eval/{name}/reward"]
            line = f"held out, after {step} steps, {name}: accuracy {right:.1%}, reward {reward:.3f} on 4 problems"
            assert line in out
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    of_sets = [sample["set"] for sample in samples if sample["kind"] == "held out" and sample["step"] == 2]
    assert of_sets == [name for name in names for _ in range(4)]
    assert all(f"Held out: {name}/accuracy" in page([tmp_path / "run"]) for name in names)


@pytest.mark.parametrize("reward", ["", "rewards.py:f", lambda completion, answer: 0.25])
def test_programs_judge_a_task_of_their_own_on_sets_too(tmp_path, monkeypatch, sets, reward):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("def f(completion, answer): return 0.25")
    options = {"eval_size": 4, "max_new_tokens": 4, "threads": 1, "reward_workers": 0, "eval_sets": f"copy,{sets}"}
    found = evaluate("tiny", "copy", reward, **options)["sets"]
    assert list(found) == ["copy", *NAMES] and found["sums"]["reward"] >= 0.5
    assert found["copy"]["reward"] == 0.25 or not reward
    if callable(reward):
        own = load_task([Problem(":1+1=", "2")], reward, name="copy", held_out=[Problem(":1+2=", "3")])
        found = evaluate("tiny", own, **{**options, "eval_sets": sets})["sets"]
        assert found["sums"]["reward"] >= 0.5


def test_a_set_is_scored_by_its_own_task_and_asked_in_its_own_way(tmp_path, sets):
    """What a set finds is what an evaluation of that task alone finds."""
    small_runs.run(tmp_path / "run", **{**FEW, "steps": 0}, eval_sets=sets)
    (row,) = evaluations(tmp_path / "run")
    for name, task in zip(NAMES, sets.split(",")):
        alone = evaluate("tiny", task, eval_size=4, max_new_tokens=12, threads=1, reward_workers=0)
        for metric in ("reward", "accuracy", "tokens_per_answer"):
            assert row[f"eval/{name}/{metric}"] == pytest.approx(alone[metric])


def test_eval_asks_several_sets_and_a_run_brings_its_own_along(tmp_path, capsys, sets):
    small_runs.run(tmp_path / "run", **{**FEW, "steps": 1}, eval_sets=sets)
    few = ["--eval-size=3", "--reward-workers=0", f"--out={tmp_path}/samples.jsonl", "--base=tiny"]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), *few]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert list(result["sets"]) == NAMES and result["task"] == "sums"
    for name, found in result["sets"].items():
        assert f"{name}, test: 3 problems" in out and found["problems"] == 3
        assert found["difference"]["reward"] == pytest.approx(found["reward"] - found["base"]["reward"])
    assert {key: value for key, value in result.items() if key != "sets"} == result["sets"]["sums"]
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["set"] for row in rows] == ["sums"] * 6 + ["countdown_mini"] * 6
    assert main(["eval", str(tmp_path / "run"), "--task=countdown_mini", *few[:2]]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "sets" not in alone and alone["task"] == "countdown_mini", "who names a task wants that one"


def test_files_of_one_task_are_called_by_their_names_and_asked_whole_unless_trained_on(tmp_path):
    own = write(tmp_path / "own.jsonl", [(f":{i}+1=", str(i + 1)) for i in range(100)])
    hard = write(tmp_path / "hard.jsonl", [(f":{i}*2=", str(2 * i)) for i in range(30)])
    task = load_tasks("jsonl", own, f"jsonl={hard}, jsonl={own}")
    (first, hard_ones), (second, own_ones) = ((name, list(problems())) for name, problems in task.judged_on())
    assert (first, second) == ("hard", "own") and len(hard_ones) == 30
    held_out = [problem.prompt for problem in task.problems("test")]
    assert [problem.prompt for problem in own_ones] == held_out and 0 < len(held_out) < 40
    assert [task.reward(problem, "4") for problem in hard_ones[:4]] == [0.0, 0.0, 1.0, 0.0]
    same = load_tasks("jsonl", own, "jsonl").judged_on()[0]
    assert same.name == "jsonl" and [problem.prompt for problem in same.problems()] == held_out, "the run's own data"
    mixed = load_tasks("jsonl=1,countdown:3=2", f"jsonl={own}", "countdown:3,jsonl")
    assert [name for name, _ in mixed.judged_on()] == ["countdown-3", "jsonl"]
    assert [len(problems()) for _, problems in mixed.judged_on()] == [1000, len(held_out)]
    assert [mixed.part_of(problems()[0]).name for _, problems in mixed.judged_on()] == ["countdown:3", "jsonl"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("copy,copy", "two evaluation sets would be called"),
        ("jsonl=a/x.jsonl,jsonl=b/x.jsonl", "would be called 'x'"),
        ("copi", "did you mean copy"),
        ("copy,", "unknown task ''"),
    ],
)
def test_sets_that_cannot_be_told_apart_or_found_are_refused(sets, message):
    with pytest.raises(TaskError, match=message):
        load_tasks("copy", "", sets)


def test_held_out_problems_of_any_set_that_are_trained_on_are_reported(tmp_path, capsys):
    rows = [(f":{i}+1=", str(i + 1)) for i in range(40)]
    own, again = write(tmp_path / "own.jsonl", rows), write(tmp_path / "again.jsonl", rows[:10])
    options = {**FEW, "steps": 0, "task": "jsonl", "data": own, "template": "raw"}
    small_runs.run(tmp_path / "run", **options, eval_sets=f"jsonl={own},jsonl={again}")
    said = capsys.readouterr().err
    assert "of the 10 held-out problems of again are also training problems" in said
    assert "own.jsonl has no splits" in said and "held-out problems of own" not in said


def test_other_sets_begin_a_new_best_and_are_said(tmp_path, capsys, sets):
    options = {**FEW, "schedule": "constant"}
    small_runs.run(tmp_path / "run", **{**options, "steps": 1}, eval_sets=sets.split(",")[0])
    small_runs.run(tmp_path / "run", **{**options, "steps": 2}, eval_sets="countdown_mini")
    assert "the evaluation sets (eval_sets) changed since the run's last steps" in capsys.readouterr().err
    rows = evaluations(tmp_path / "run")
    assert [("eval/countdown_mini/reward" in row, row["step"]) for row in rows] == [(False, 0), (True, 1), (True, 2)]


ENVIRONMENT = """
from rwkv_es.task import Done, Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE, MAX_TURNS = "1", (), 4, "raw", 2

def problems(split, data=""):
    return [Problem(f":{i}+{i}=", "") for i in range(3)]

def environment(problem):
    yield
    yield "+"
    return Done(0.5)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_environment_may_judge_what_another_task_trains(tmp_path, workers, sets):
    (tmp_path / "play.py").write_text(ENVIRONMENT)
    sets = f"{tmp_path}/play.py,countdown_mini"
    options = {**FEW, "steps": 0, "reward_workers": workers, "engine": "torch"}
    small_runs.run(tmp_path / "run", **options, eval_sets=sets)
    (row,) = evaluations(tmp_path / "run")
    assert row["eval/play/reward"] == 0.5 and row["eval/play/turns_per_episode"] == 2
    assert "eval/countdown_mini/turns_per_episode" not in row


def test_likelihoods_are_of_each_set(tmp_path, sets):
    small_runs.run(tmp_path / "run", **{**FEW, "steps": 1, "max_new_tokens": 0}, eval_sets=sets, objective="logprob")
    row = evaluations(tmp_path / "run")[-1]
    nats = [row[f"eval/{name}/nats_per_token"] for name in NAMES]
    assert nats[0] != nats[1] and row["eval/nats_per_token"] == nats[0]


def test_several_answers_to_each_problem_by_hand(tmp_path, capsys):
    """avg@k and pass@k against the same answers, asked for one by one and counted here."""
    (tmp_path / "rewards.py").write_text("def even(completion, answer): return float(len(completion) % 2 == 0)")
    options = {**FEW, "steps": 0, "temperature": 1.0, "samples": 2, "prompts": 2}
    small_runs.run(tmp_path / "run", **options, eval_samples=6, reward=f"{tmp_path}/rewards.py:even")
    (row,) = evaluations(tmp_path / "run")
    session = open_session(Config(task="countdown_mini", temperature=1.0, max_new_tokens=12, threads=1))
    problems = session.task.problems("test")[:4]
    texts = answer(session, problems, BASE._replace(step=0), 6).texts
    right = [sum(len(text.lstrip(" ")) % 2 == 0 for text in texts[6 * i : 6 * i + 6]) for i in range(4)]
    assert 0 < sum(right) < 24
    assert row["eval/avg@6"] == pytest.approx(sum(right) / 24)
    for k in (1, 2, 4, 6):
        misses = [math.prod((6 - c - j) / (6 - j) for j in range(k)) for c in right]
        assert row[f"eval/pass@{k}"] == pytest.approx(1 - sum(misses) / 4)
    assert "eval/pass@3" not in row and row["eval/tokens_per_answer"] <= 12
    line = f", avg@6 {row['eval/avg@6']:.3f}, pass@6 {row['eval/pass@6']:.3f} on 4 problems"
    assert line in capsys.readouterr().out and "Held out: avg@k" in page([tmp_path / "run"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-samples=4"], "eval_samples 4 does nothing if all answers are greedy"),
        (["--eval-sets=copy", "--eval-every=0"], "eval_sets copy does nothing without held-out evaluations"),
        (["--eval-samples=4", "--temperature=1", "--eval-every=0"], "eval_samples 4 does nothing without held-out"),
    ],
)
def test_what_would_do_nothing_is_refused(options, message, capsys):
    assert main(["train", "--task=copy", "--model=tiny", *options]) == 2
    assert message in capsys.readouterr().err


def test_processes_find_together_what_one_finds(tmp_path, monkeypatch, sets):
    monkeypatch.setenv("PYTEST_LOGS", str(tmp_path))
    options = {"eval_sets": sets, "eval_samples": 3, "temperature": 1, "steps": 2, "eval_size": 5}
    try:
        for size in (1, 2):
            codes, said = jobs.run_together(size, jobs.arguments(tmp_path / str(size), **options))
            assert codes == [0] * size, said
    finally:
        jobs.end_all()
    one, two = (
        [{k: v for k, v in row.items() if k.startswith("eval/")} for row in evaluations(tmp_path / size)]
        for size in ("1", "2")
    )
    assert one == two and {"eval/countdown_mini/pass@2", "eval/sums/avg@3"} <= one[0].keys()


def test_a_reward_that_scores_none_of_the_sets_is_refused(capsys):
    options = ["--reward=builtin:length", "--task=svamp"]
    assert main(["eval", "tiny", "--eval-sets=copy,gsm8k", *options]) == 2
    assert "reward builtin:length does nothing with eval_sets of other tasks than --task" in capsys.readouterr().err
