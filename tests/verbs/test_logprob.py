"""Objective logprob: members are paid for the likelihood of reference answers, alone or beside their own answers'."""

import json
import math
import shutil

import numpy as np
import pytest
import reference
import torch
from checkpoints import random_params
from jobs import arguments, end_all, run_together
from small_runs import checksums, run, steps_of

from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.es.strategy import ES
from rwkv_es.pretrained import checkpoint
from rwkv_es.session import open_session
from rwkv_es.session import read as read_session
from rwkv_es.session import reference as reference_of
from rwkv_es.verbs.drift import read

LOGPROB = {"objective": "logprob", "max_new_tokens": 0, "eval_size": 8, "reward_workers": 0}


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "logprob", **LOGPROB)


def test_a_member_earns_the_mean_log_likelihood_of_the_reference_answers_tokens():
    """Of members 2 and 5 and two problems, written out in float64 with the weights formed."""
    session = open_session(Config(task="countdown_mini", threads=1))
    es = ES(session.model, sigma=0.02, population=8, targets={"matrices": 1, "head.weight": 3})
    problems = session.task.problems("train")[3:5]
    found = read_session(session, problems, es.ask(range(1, 3))).per_token
    noise = es.noise.at(0, 0.02)
    for member in (2, 5):
        params = dict(session.model.params)
        for name, target in noise.targets.items():
            a, b = (factor[0].double() for factor in noise.factors(name, torch.tensor([member // 2])))
            params[name] = params[name].double() + (1 - 2 * (member % 2)) * target.multiplier * 0.02 * (a @ b.T)
        for place, problem in enumerate(problems):
            prompt, answer = (session.tokenizer.encode(text) for text in (problem.prompt, problem.answer))
            scores = reference.logits(params, [*prompt, *answer])[len(prompt) - 1 :]
            scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
            expected = scores[range(len(answer) + 1), [*answer, 0]].mean()  # token 0 ends it
            assert found[member - 2, place].item() == pytest.approx(expected, abs=1e-5)  # fp32 against fp64


def test_nothing_is_sampled_and_every_step_moves(read_only):
    assert len(set(checksums(read_only))) == 4
    rows = metrics_of(read_only)
    assert all(row["tokens_per_answer"] == 0 for row in rows if "tokens_per_answer" in row)
    for row in (row for row in rows if "nats_per_token" in row):
        assert row["nats_per_token"] > 0 and row["share_of_problems_with_signal"] == 1
    held_out = [row for row in rows if "eval/reward" in row]
    assert [row["step"] for row in held_out] == [0, 2, 4] and not any("eval/accuracy" in row for row in held_out)


def test_held_out_metrics_are_those_of_the_answers_as_texts(read_only):
    """Token by token in float64."""
    session = open_session(Config(task="countdown_mini", threads=1))
    total = tokens = num_bytes = 0
    means = []
    for problem in session.task.problems("test")[:8]:
        prompt, answer = (session.tokenizer.encode(text) for text in (problem.prompt, problem.answer))
        scores = reference.logits(session.base, [*prompt, *answer])[len(prompt) - 1 :]
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        chosen = scores[range(len(answer) + 1), [*answer, 0]]
        total, tokens, num_bytes = total + chosen.sum(), tokens + len(chosen), num_bytes + len(problem.answer)
        means.append(chosen.mean())
    first = metrics_of(read_only)[0]
    assert first["eval/nats_per_token"] == pytest.approx(-total / tokens, rel=1e-4)
    assert first["eval/bits_per_byte"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-4)
    assert first["eval/reward"] == pytest.approx(np.mean(means), rel=1e-4)


@pytest.mark.promise
@pytest.mark.parametrize("options", [{"slots": 8}, {"slots": 24, "threads": 2}])
def test_slots_and_threads_never_change_a_bit(read_only, tmp_path, options):
    assert checksums(run(tmp_path / "run", **LOGPROB, **options)) == checksums(read_only)


@pytest.mark.promise
def test_two_processes_make_the_run_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_LOGS", str(tmp_path))
    options = {**LOGPROB, "eval_size": 5, "objective": "outcome=1,logprob=0.5", "max_new_tokens": 20}
    assert main(arguments(tmp_path / "alone", **options)) == 0
    codes, outputs = run_together(2, arguments(tmp_path / "run", **options))
    end_all()
    assert codes == [0, 0], outputs
    runs = [steps_of(tmp_path / name) for name in ("alone", "run")]
    assert [[step[key] for step in runs[0]] for key in ("checksum", "rewards", "tokens")] == [
        [step[key] for step in runs[1]] for key in ("checksum", "rewards", "tokens")
    ]
    found = [[row for row in metrics_of(tmp_path / name) if "eval/reward" in row] for name in ("alone", "run")]
    assert len(found[0]) == 4
    for one, other in zip(*found):
        assert {k: v for k, v in one.items() if k.startswith("eval/")} == {
            k: v for k, v in other.items() if k.startswith("eval/")
        }


def test_a_run_is_replayed_and_goes_on(read_only, tmp_path, capsys):
    assert main(["replay", str(read_only)]) == 0
    shutil.copytree(read_only, tmp_path / "run")
    lines = (read_only / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "ledger.jsonl").write_text("".join(lines[:3]) + lines[3][:50])  # torn by a crash
    assert checksums(run(tmp_path / "run", **LOGPROB)) == checksums(read_only)
    assert "after step 3" in capsys.readouterr().out
    assert [
        row["eval/reward"] for row in metrics_of(tmp_path / "run") if row.get("step") == 4 and "eval/reward" in row
    ] == ([metrics_of(read_only)[-1]["eval/reward"]])


def test_a_sum_pays_both(tmp_path):
    folder = run(tmp_path / "sum", **{**LOGPROB, "objective": "outcome=2,logprob=0.5", "max_new_tokens": 40})
    only = [run(tmp_path / name, **{**LOGPROB, "objective": name, "max_new_tokens": n}) for name, n in (("mean", 40),)]
    rewards = torch.tensor(steps_of(folder)[0]["rewards"]), torch.tensor(steps_of(only[0])[0]["rewards"])
    likelihood = torch.tensor(steps_of(run(tmp_path / "logprob", **LOGPROB))[0]["rewards"])
    torch.testing.assert_close(rewards[0], 2 * rewards[1] + 0.5 * likelihood)
    first = metrics_of(folder)[0]
    assert "eval/accuracy" in first and "eval/bits_per_byte" in first


def test_a_text_file_is_learned_from(tmp_path):
    """A text of few characters that the embedded model does not expect: bits per byte as `eval --text` counts them."""
    (tmp_path / "train.txt").write_text("1+2=3:" * 200)
    (tmp_path / "test.txt").write_text("1+2=3:" * 40)
    options = {**LOGPROB, "task": "text:60", "data": tmp_path, "sigma": 0.02, "lr": 0.05, "steps": 6, "eval_every": 6}
    held_out = [row for row in metrics_of(run(tmp_path / "run", **options)) if "eval/reward" in row]
    assert held_out[-1]["eval/bits_per_byte"] < held_out[0]["eval/bits_per_byte"] - 0.1
    session = open_session(Config(task="text:60", data=str(tmp_path), threads=1))
    pieces = [problem.answer for problem in session.task.problems("test")]
    assert "".join(pieces) == "1+2=3:" * 40
    nll = sum(read([session.model], session.tokenizer.encode(piece), session.decoding).nll[0] for piece in pieces)
    assert held_out[0]["eval/bits_per_byte"] == pytest.approx(nll / math.log(2) / 240, rel=1e-5)


def evaluated(capsys, argv):
    assert main(["eval", *map(str, argv), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_a_run_is_evaluated_by_what_it_was_trained_on(read_only, capsys):
    """Its export, found by the folder's name, has the last held-out numbers of the training."""
    held_out = [row for row in metrics_of(read_only) if "eval/reward" in row]
    best = max(held_out, key=lambda row: row["eval/reward"])
    found, out = evaluated(capsys, [read_only])
    assert found["logprob"] == pytest.approx(best["eval/reward"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(best["eval/bits_per_byte"], rel=1e-5)
    assert "accuracy" not in found and f"{found['bits_per_byte']:.4f} bits/byte" in out


def test_two_models_are_compared_by_the_likelihood_of_a_text_or_by_both(tmp_path, read_only, capsys):
    (tmp_path / "test.txt").write_text("1+2=3:" * 40)
    text = ["--task", "text:60", "--data", tmp_path]
    assert main(["eval", "tiny", *map(str, text)]) == 2
    assert "the prompt is empty" in (said := capsys.readouterr().err) and "--objective logprob" in said
    found, out = evaluated(capsys, [read_only, *text, "--base", "tiny", "--objective", "logprob"])
    difference = found["logprob"] - found["base"]["logprob"]
    assert found["difference"]["logprob"] == pytest.approx(difference) and "McNemar" not in out
    both, _ = evaluated(capsys, ["tiny", "--eval-size", 4, "--objective", "outcome=1,logprob=1"])
    assert both["problems"] == 4 and {"accuracy", "logprob", "bits_per_byte"} <= both.keys()


def test_a_lone_surrogate_is_read_as_the_mark_of_what_is_no_text(tmp_path):
    """JSON may hold one; no file in UTF-8 can."""
    world = {"max_new_tokens": 0, "template": "raw"}
    checkpoint.save(model := tmp_path / "m.pth", random_params(1, 64, 65536))
    for name, answer in {
        "lone": "a\\ud800",
        "mark": "a\ufffd",
        "pair": "\\ud83d\\ude00",
        "smile": "\U0001f600",
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "1+1=", "answer": "{answer}"}}\n', encoding="utf-8")
    found = {}
    for name in ("lone", "mark", "pair", "smile"):
        config = Config(model=str(model), task="jsonl", data=str(tmp_path / f"{name}.jsonl"), threads=1, **world)
        session = open_session(config)
        found[name] = reference_of(session, session.task.problems("train")[0])
    assert found["lone"] == found["mark"] and found["lone"].num_bytes == 4 + len("\n\nUser:")
    assert found["pair"] == found["smile"] and found["pair"].num_bytes == 4 + len("\n\nUser:")


def test_what_cannot_be_read_is_said(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1=", "answer": ""}\n')
    argv = arguments(tmp_path / "run", **LOGPROB, task="jsonl", data=tmp_path / "a.jsonl", template="raw", prompts=1)
    assert main(argv) == 2
    assert "objective logprob reads the reference answer of every problem, and one has none: '1+1='" in (
        capsys.readouterr().err
    )
    assert main(["doctor", "--objective", "logprob"]) == 2
    assert "doctor looks at sampled answers" in capsys.readouterr().err
    assert main(["train", "--objective", "logprob", "--temperature", "1"]) == 2
    assert "temperature 1.0 does nothing with objective logprob alone" in capsys.readouterr().err
