"""Other people's rewards, tasks and data, each trained on by one command and without an edit of the package."""

import json
import re

import pytest
from checkpoints import random_params
from places import DATA

from rwkv_es.cli import main
from rwkv_es.pretrained.checkpoint import save
from rwkv_es.task import Problem

SMALL = "--steps 2 --population 4 --prompts 2 --max-new-tokens 6 --eval-size 2 --engine torch --threads 1 --temperature 1 --sigma 0.2 --lr 0.1 --tracker none"
TRL = """
def longest(completions, **kwargs):
    most = max(len(completion) for completion in completions)
    return [float(len(completion) == most) for completion in completions]

def misspelt(completions, **kwargs):
    return [float(kwargs["solution"][0] in c) for c in completions]

def longer(completion_ids, **kwargs):
    return [float(sum(ids)) / 100 for ids in completion_ids]

async def applicable(prompts, completions, level, log_metric=None, **kwargs):
    log_metric("chars", float(len(completions[0])))
    return [float(len(completion)) if value == "odd" else None for value, completion in zip(level, completions)]
"""
VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, extra_info["index"]) == ("mini", int(ground_truth))
    return {"score": sum(map(ord, solution_str)) / 1000, "chars": len(solution_str)}
"""
TASK = """
from rwkv_es.task import Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 6, "raw"
def problems(split, data=""):
    return [Problem(f"{a} {2 if split == 'train' else 3} 1=5:", "") for a in range(1, 5)]
def reward(problem, text):
    return sum(map(ord, text)) / 1000
"""


def rows(kind):
    for i in range(4):
        prompt = f"{i + 1} {kind} 1=5:"
        yield {"prompt": prompt, "answer": str(i), "level": "odd" if i % 2 else "even"}


def verl_rows(kind):
    for i, row in enumerate(rows(kind)):
        prompt = [{"role": "user", "content": row["prompt"]}]
        model = {"style": "rule", "ground_truth": str(i)}
        yield {"data_source": "mini", "prompt": prompt, "reward_model": model, "extra_info": {"index": i}}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder as a user has it, with files of each kind."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "trl": TRL,
        "verl": VERL,
        "mine": TASK,
        "one": "def reward(completion, answer): return sum(map(ord, completion)) / 1000",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    for folder, make in (("data", rows), ("verl_data", verl_rows)):
        (tmp_path / folder).mkdir()
        for split, kind in (("train", 2), ("test", 3)):
            (tmp_path / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make(kind)))
    return tmp_path


def train(work, command):
    """Run a command line; return the metrics of its steps."""
    assert main(["train", *command.split(), *SMALL.split(), "--run", "run"]) == 0
    steps = [json.loads(line) for line in (work / "run" / "ledger.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and len({step["checksum"] for step in steps}) == 2, "the weights moved"
    metrics = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in metrics if "reward_mean" in row]


def test_a_jsonl_file_and_one_line_of_python(work, capsys):
    metrics = train(work, "--model tiny --task jsonl --data data/train.jsonl --template raw --reward one.py:reward")
    assert all(0 < row["reward/reward"] < 2 for row in metrics)
    said = capsys.readouterr().err
    assert re.search(r"data/train\.jsonl has no splits: \d+ problems are for training, \d held out, by a hash", said)
    assert "held-out problems are also" not in said


def test_rewards_written_for_trl(work, capsys):
    rewards = "trl.py:longer=0.5,trl.py:applicable=0.25,builtin:length=-1"
    metrics = train(work, f"--model tiny --task jsonl --data data --template raw --reward {rewards}")
    for row in metrics:
        assert row["reward/longer"] > 0 and row["log/chars"] > 0 and row["reward/length"] <= 0
    assert "held-out problems are also" not in capsys.readouterr().err


@pytest.mark.parametrize("samples", [1, 2])
def test_rewards_that_compare_answers_tell_the_members_of_a_pair_apart(work, samples):
    command = f"--model tiny --task jsonl --data data --template raw --reward trl.py:longest --samples {samples}"
    assert all(
        0.5 / samples <= row["reward_mean"] < 1 and row["reward_std_of_members"] > 0 for row in train(work, command)
    )


@pytest.mark.parametrize("command", ["train --model tiny --run run --steps 2 --population 4 --prompts 2", "eval tiny"])
def test_a_reward_that_always_fails_is_said_once_with_its_own_last_line(work, command, capsys):
    data = "--task jsonl --data data --template raw --max-new-tokens 4 --eval-size 2 --engine torch --threads 1"
    assert main([*command.split(), *data.split(), "--reward", "trl.py:misspelt"]) == 0
    said = capsys.readouterr().err
    assert said.count("the reward failed on") == said.count("KeyError: 'solution'") == 1
    assert re.search(r'trl\.py", line 7, in misspelt\n +return \[float\(kwargs\["solution"\]\[0\] in c\)', said)


def test_a_task_whose_reward_has_a_mistake_is_told_so(work, capsys):
    (work / "mine.py").write_text(
        TASK.replace('1=5:", "")', '1=5:", "5")').replace("sum(map(ord, text))", "number(text)")
    )
    assert main(["train", "--model", "tiny", "--task", "./mine.py", "--prompts", "4"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert "NameError: name 'number' is not defined (mine.py, line 7, in reward: return number(text) / 1000)" in said


def test_a_reward_and_data_written_for_verl(work):
    metrics = train(work, "--model tiny --task jsonl --data verl_data --template raw --reward verl.py:compute_score")
    assert all(
        row["log/chars"] > 0 and row["reward/compute_score"] == pytest.approx(row["reward_mean"]) for row in metrics
    )


def test_held_out_problems_are_not_needed_where_nobody_asks_for_them(work):
    (work / "data" / "test.jsonl").unlink()
    train(work, "--model tiny --task jsonl --data data --template raw --reward one.py:reward --eval-every 0")


def test_a_task_outside_the_package(work):
    assert all(0 < row["reward_mean"] < 2 for row in train(work, "--model tiny --task ./mine.py"))


@pytest.mark.parametrize("objective", ["pass", "maj"])
def test_several_samples_may_count_by_the_best_or_by_the_majority(work, objective):
    train(work, f"--model tiny --task ./mine.py --samples 3 --objective {objective}")


def test_a_mixture_with_weights(work, capsys):
    if not (DATA / "gsm8k").is_dir():
        pytest.skip(f"{DATA} is not there; set RWKV_ES_DATA to the folder that holds it")
    save("world.pth", random_params(1, 64, 65536))
    lines = (DATA / "svamp" / "test.jsonl").read_text("utf-8").split("\n")
    for split, part in (("train", lines[:50]), ("test", lines[50:60])):
        (work / "data" / f"{split}.jsonl").write_text("\n".join(part))
    tasks = f"--task svamp=1,gsm8k=2,countdown=1 --data svamp=data,gsm8k={DATA / 'gsm8k'}"
    metrics = train(
        work, f"--model world.pth {tasks} --reward builtin:task,builtin:length=0.1 --prompts 4 --shots 1 --bos"
    )
    assert all(row["reward/length"] < 0 and row["reward/task"] == 0 for row in metrics)
    samples = (work / "run" / "samples.jsonl").read_text()
    assert "held-out problems are also" not in capsys.readouterr().err
    assert "Reach the target" in samples or "How" in samples


def test_the_parts_of_a_mixture_end_each_in_its_own_way(work):
    """One task stops before "<", the others do not: what they answer is not cut by it."""
    from rwkv_es.config.options import build
    from rwkv_es.session import answer, open_session

    (work / "stops.py").write_text(TASK.replace("(), 6,", "('<',), 6,"))
    options = {"model": "tiny", "threads": 1, "engine": "torch"}
    mixed = open_session(build({**options, "task": "./stops.py=1,countdown_mini=1,copy=1", "max_new_tokens": 40}))
    problems = mixed.task.problems("test")[:9]
    together = answer(mixed, problems)
    assert [p.prompt for p in together.problems] == [p.prompt for p in problems]
    for problem, text in zip(problems, together.texts):
        part = mixed.task.part_of(problem)
        alone = open_session(
            build({**options, "task": {"stops": "./stops.py"}.get(part.name, part.name), "max_new_tokens": 40})
        )
        assert answer(alone, [Problem(problem.prompt, "")]).texts == [text]
    assert any("<answer>" in text for text in together.texts)


@pytest.mark.parametrize("end", ["4", "<ans"])
def test_generation_goes_through_an_end_string_and_no_further(work, end):
    """An end string may also be a part of a token."""
    from rwkv_es.config.options import build
    from rwkv_es.session import answer, open_session

    (work / "ends.py").write_text(
        TASK.replace("MAX_NEW_TOKENS, ", "MAX_NEW_TOKENS, STOP_INCLUDED, ").replace("(), 6,", f"(), 60, ({end!r},),")
    )
    session = open_session(build({"model": "tiny", "threads": 1, "engine": "torch", "task": "./ends.py"}))
    plain = open_session(
        build({"model": "tiny", "threads": 1, "engine": "torch", "task": "./mine.py", "max_new_tokens": 60})
    )
    problems = session.task.problems("train")
    ended, whole = answer(session, problems), answer(plain, problems)
    assert any(text.partition(end)[2] for text in whole.texts), "something follows"
    for text, long, ids, all_ids in zip(ended.texts, whole.texts, ended.token_ids, whole.token_ids):
        assert text == (long.partition(end)[0] + end if end in long else long)
        assert ids == all_ids[: len(ids)] and (len(ids) < len(all_ids)) == bool(long.partition(end)[2])


def test_every_prompt_may_start_with_token_0(work):
    from rwkv_es.config.options import build
    from rwkv_es.session import encode_prompt, open_session

    with_bos, without = (open_session(build({"model": "tiny", "task": "copy", "bos": bos})) for bos in (True, False))
    problem = without.task.problems("test")[0]
    assert encode_prompt(with_bos, problem) == (0, *encode_prompt(without, problem))


SEEN = """
def seen(completions, prompts, **columns):
    with open("seen.txt", "a") as file:
        file.write(f"{len(completions)} {len(set(prompts))}\\n")
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("group, calls", [("pair", ["4 1"] * 4), ("problem", ["8 1"] * 2), ("step", ["16 2"])])
def test_a_reward_that_compares_sees_the_group_that_the_option_says(work, group, calls):
    (work / "seen.py").write_text(SEEN)
    command = "--model tiny --task jsonl --data data --template raw --reward seen.py:seen --samples 2 --temperature 1"
    options = f"--steps 1 --population 4 --prompts 2 --eval-every 0 --reward-group {group} --max-new-tokens 4 --run run"
    assert main(["train", *command.split(), *options.split()]) == 0
    lines = (work / "seen.txt").read_text().splitlines()
    assert lines[-len(calls) :] == calls, "those before are of the reference answers"
