"""Evaluation: metrics by hand, a stub that answers known texts, tables and files recomputed from the samples."""

import json
import math
from itertools import combinations

import pytest
import torch

from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.engine.rollout import Completion, Rollout
from rwkv_es.measure.judgement import Judged, of_greedy, of_samples
from rwkv_es.measure.metrics import StepCounts
from rwkv_es.pretrained import checkpoint
from rwkv_es.reward.adapters import Answer
from rwkv_es.session import Answers
from rwkv_es.system.errors import CheckpointError, ConfigError
from rwkv_es.task import Problem, load_task
from rwkv_es.verbs import evaluate

FAST = {"threads": 1, "slots": 64, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint near the embedded one that answers some problems otherwise."""
    path = checkpoint.resolve("tiny")
    params, _ = checkpoint.load(path)
    folder = tmp_path_factory.mktemp("other")
    noise = torch.randn(params["head.weight"].shape, generator=torch.Generator().manual_seed(0))
    moved = {**params, "head.weight": (params["head.weight"].float() + 0.05 * noise).to(params["head.weight"].dtype)}
    checkpoint.save(folder / "other.pth", moved)
    (folder / "other.tokenizer.json").write_bytes(path.with_name("rwkv7-tiny.tokenizer.json").read_bytes())
    return str(folder / "other.pth")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_metrics_of_samples_by_hand():
    problems = [Problem("a", "1"), Problem("b", "2"), Problem("c", "3")]
    texts = ["<answer>1</answer>", "<answer>1</answer>", "<answer>9</answer>", "no"]  # the majority is right
    texts += ["<answer>2</answer>", "<answer>8</answer>", "<answer>8</answer>", "<answer>7</answer>"]  # is wrong
    texts += ["<answer>3</answer>", "<answer>5</answer>", "<answer>5</answer>", "<answer>3</answer>"]  # is split
    rewards = [1.0, 1.0, 0.1, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert of_samples(Judged(problems, texts, rewards)) == {
        "avg@4": pytest.approx([2.1 / 4, 1 / 4, 2 / 4]),
        "maj@4": [1.0, 0.0, 0.5],
        "pass@1": pytest.approx([1 / 2, 1 / 4, 1 / 2]),
        "pass@2": pytest.approx([1 - 1 / 6, 1 / 2, 1 - 1 / 6]),
        "pass@4": [1.0, 1.0, 1.0],
    }


def test_pass_at_the_number_of_samples_is_there_even_if_it_is_no_power_of_two():
    found = of_samples(Judged([Problem("a", "1")], ["x"] * 6, [0.0] * 5 + [1.0]))
    assert [name for name in found if "pass" in name] == ["pass@1", "pass@2", "pass@4", "pass@6"]
    assert found["pass@6"] == [1.0]


def test_partial_rewards_are_not_right():
    assert of_greedy(Judged([Problem("a", "1")] * 3, ["", "", ""], [0.1, 1.0, 0.99])) == {
        "accuracy": [0.0, 1.0, 0.0],
        "reward": [0.1, 1.0, 0.99],
    }


def test_samples_are_greedy_ones_and_k_more_and_the_summary_follows_from_the_file(tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    arguments = ["--eval-size", "12", "--samples", "3", "--temperature", "1", "--out", str(out)]
    assert main(["eval", "tiny", *options, *arguments]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    result, rows = json.loads(last), rows_of(out)
    assert [(row["decoding"], row["sample"]) for row in rows[:14]] == [("greedy", 0)] * 12 + [
        ("sampled", 0),
        ("sampled", 1),
    ]
    assert len(rows) == 12 + 36
    with pytest.raises(ConfigError, match=r"samples\.jsonl exists already"):
        evaluate.evaluate(Config(eval_size=12, out=str(out), **FAST))
    out = tmp_path / "again.jsonl"
    evaluate.evaluate(Config(eval_size=12, out=str(out), **FAST))
    assert [row["completion"] for row in rows_of(out)] == [row["completion"] for row in rows[:12]]
    greedy = [row["reward"] for row in rows[:12]]
    assert result["accuracy"] == sum(greedy) / 12
    groups = [rows[i : i + 3] for i in range(12, 48, 3)]
    assert all(len({row["prompt"] for row in group}) == 1 for group in groups)
    rewards = [[row["reward"] for row in group] for group in groups]
    assert result["avg@3"] == pytest.approx(sum(map(sum, rewards)) / 36)
    assert result["pass@2"] == pytest.approx(sum(max(pair) for row in rewards for pair in combinations(row, 2)) / 36)
    assert result["pass@3"] == pytest.approx(sum(map(max, rewards)) / 12)
    assert 0 < result["avg@3"] < 1
    assert result["problems"] == 12
    for name in ("accuracy", "avg@3", "maj@3", "pass@1", "pass@2", "pass@3"):
        low, high = result[f"{name} 95%"]
        assert low <= result[name] <= high
        assert any(line.startswith(f"{name} ") and f"{result[name]:.4f}" in line for line in shown)


def test_two_models_are_compared_on_the_same_problems(other, tmp_path, capsys):
    out = tmp_path / "samples.jsonl"
    result = evaluate.evaluate(Config(model=other, base="tiny", eval_size=40, out=str(out), **FAST))
    rows = rows_of(out)
    base, tuned = rows[:40], rows[40:]
    assert {row["model"] for row in tuned} == {other} and other not in {row["model"] for row in base}
    assert [row["prompt"] for row in base] == [row["prompt"] for row in tuned]
    pairs = [(before["reward"], after["reward"]) for before, after in zip(base, tuned)]
    gained, lost = pairs.count((0.0, 1.0)), pairs.count((1.0, 0.0))
    assert gained + lost > 0, "the models must differ for this to mean anything"
    assert (result["right_only_tuned"], result["right_only_base"]) == (gained, lost)
    assert result["difference"]["accuracy"] == pytest.approx((gained - lost) / 40)
    assert result["base"]["accuracy"] == sum(before for before, _ in pairs) / 40
    tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1))
    assert result["mcnemar_p"] == pytest.approx(min(1.0, 2 * tail / 2 ** (gained + lost)))
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1]) == result
    assert "McNemar" in shown[-2]
    assert all(word in shown[1] for word in ("base", "tuned", "difference"))


def test_known_answers_get_the_known_scores(tmp_path, monkeypatch, capsys):
    """GSM8K through the whole verb, but for the model: five answers are given."""
    rows = [{"question": f"{i}+{i}", "answer": f"so {2 * i}\n#### {2 * i}"} for i in range(1, 6)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["#### 2", "it is 4.", "#### 7", "#### 8 or 9", "nothing"]  # of 2, 4, 6, 8, 10

    class Stub:
        model = decoding = None
        task = load_task("gsm8k", str(tmp_path))
        base_path = tmp_path / "stub.pth"

    monkeypatch.setattr(evaluate, "open_session", lambda config, task: Stub)
    monkeypatch.setattr(evaluate, "examined_alone", lambda session: session)
    monkeypatch.setattr(evaluate, "greedy", lambda session: session)
    monkeypatch.setattr(
        evaluate, "count", lambda answers, scores, reading: StepCounts(5, 0, 0, 0, scores.errors, scores.timeouts)
    )

    def answer(session, problems, scorers, advance):
        for place, (problem, text) in enumerate(zip(problems, texts, strict=True)):
            scorers.submit(place, Answer(problem, text))
        return Answers(problems, texts, Rollout([Completion([], "stop")] * len(texts), 0, 0))

    monkeypatch.setattr(evaluate, "answer", answer)
    result = evaluate.evaluate(Config(task="gsm8k", data=str(tmp_path), reward_workers=0))
    assert result["accuracy"] == 3 / 5  # its own rule: after ####, else the last number
    assert result["exact_match,strict-match"] == 2 / 5
    assert result["exact_match,flexible-extract"] == 2 / 5  # "9" is the last number of the fourth
    assert result["accuracy 95%"] == pytest.approx([0.2307, 0.8824], abs=1e-4)  # Wilson, 3 of 5


def test_samples_that_would_all_be_the_same_are_refused():
    with pytest.raises(ConfigError, match="samples is 4, and at temperature 0 they are all the same"):
        evaluate.evaluate(Config(samples=4, reward_workers=0, **FAST))


def test_samples_that_cannot_be_written_are_one_line():
    with pytest.raises(ConfigError, match="/no/where cannot be written: /no is no folder"):
        evaluate.evaluate(Config(eval_size=2, reward_workers=0, out="/no/where", **FAST))


def states(params, **changed):
    shape = (params["blocks.0.att.r_k"].shape[0], 64, 64)
    count = sum(name.endswith("att.r_k") for name in params)
    generator = torch.Generator().manual_seed(1)
    found = {f"blocks.{i}.att.time_state": 3 * torch.randn(shape, generator=generator) for i in range(count)}
    return {**found, **changed}


def test_an_initial_state_file_is_the_state_merged_into_the_checkpoint(tmp_path, capsys):
    path = checkpoint.resolve("tiny")
    params, _ = checkpoint.load(path)
    state = states(params)
    torch.save(state, tmp_path / "state.pth")
    checkpoint.save(tmp_path / "merged.pth", {**params, **state})
    (tmp_path / "merged.tokenizer.json").write_bytes(path.with_name("rwkv7-tiny.tokenizer.json").read_bytes())
    options = {"prompt": "3 7 10=24:", **FAST}
    (plain,) = evaluate.generate(Config(**options))
    (with_file,) = evaluate.generate(Config(state=str(tmp_path / "state.pth"), **options))
    (merged,) = evaluate.generate(Config(model=str(tmp_path / "merged.pth"), **options))
    assert with_file == merged != plain
    state_option = {"state": str(tmp_path / "state.pth"), "reward_workers": 0, "eval_size": 20, **FAST}
    result = evaluate.evaluate(Config(base="tiny", out=str(tmp_path / "out.jsonl"), **state_option))
    rows = [row["completion"] for row in rows_of(tmp_path / "out.jsonl")]
    assert rows[:20] != rows[20:], "the state is the model's, not its base's"
    assert result["base"]["accuracy"] == evaluate.evaluate(Config(**{**state_option, "state": ""}))["accuracy"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.att.time_state": torch.zeros(1, 64, 32)}, "blocks.0.att.time_state is"),
        ({"blocks.99.att.time_state": torch.zeros(1, 64, 64)}, "blocks.99.att.time_state is .* should be absent"),
        ({"emb.weight": torch.zeros(2, 2)}, "emb.weight is"),
        ({"blocks.0.att.time_state": None}, "blocks.0.att.time_state is missing"),
    ],
)
def test_another_initial_state_is_refused(tmp_path, change, words):
    params, _ = checkpoint.load(checkpoint.resolve("tiny"))
    wrong = {name: tensor for name, tensor in states(params, **change).items() if tensor is not None}
    torch.save(wrong, tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match=words):
        evaluate.generate(Config(state=str(tmp_path / "state.pth"), prompt="3 7 10=24:", **FAST))


def test_what_was_found_is_shown_though_its_samples_find_no_room(tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in FAST.items()]
    out = tmp_path / "samples.jsonl"
    argv = ["eval", "tiny", "--task=countdown_mini", "--eval-size=2", "--reward-workers=0", f"--out={out}", *options]
    assert main(argv) == 2
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["problems"] == 2
    assert f"cannot write {out} (No space left on device); make room there" in said.err
    assert not any(tmp_path.iterdir())
