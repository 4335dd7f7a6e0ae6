"""What a step's answers say about a run: missing rewards, advice, and when to stop."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from jobs import arguments

import rwkv_es
from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.engine.references import Reading
from rwkv_es.engine.rollout import Rollout
from rwkv_es.es.strategy import ES
from rwkv_es.measure.health import advise_without_signal, watch_broken, watch_unperturbed
from rwkv_es.measure.metrics import StepCounts
from rwkv_es.pretrained.checkpoint import load, save
from rwkv_es.run.record import read_steps
from rwkv_es.session import Answers
from rwkv_es.system.errors import ConfigError

TINY = Path(rwkv_es.__file__).parent / "tiny" / "rwkv7-tiny.pth"


@pytest.fixture
def broken(monkeypatch):
    """Let every member of some pairs answer without an end in sight: their rollout says that the logits broke."""

    def install(members):
        from rwkv_es import session

        whole = session.rollout

        def rollout(model, requests, decoding, factors, on_finished):
            found = whole(
                model,
                requests,
                decoding,
                factors,
                lambda ended: on_finished({i: c._replace(finish=of(i, c)) for i, c in ended.items()}),
            )
            return Rollout([c._replace(finish=of(i, c)) for i, c in enumerate(found.completions)], *found[1:])

        def of(place, completion):
            return "broken" if rollout.requests[place].member in members else completion.finish

        def noting(model, requests, *rest):
            rollout.requests = requests
            return rollout(model, requests, *rest)

        monkeypatch.setattr(session, "rollout", noting)

    return install


def test_broken_answers_are_counted_named_and_their_rewards_missing(tmp_path, broken, capsys):
    broken({3, 6})
    assert main(arguments(tmp_path / "run", steps=1)) == 0
    assert "step 1: 4 answers ended because the logits were not finite (members 3, 6)" in capsys.readouterr().err
    rewards = read_steps(tmp_path / "run")[0].rewards
    assert [row == [None, None] for row in rewards] == [member in (3, 6) for member in range(8)]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(row for row in metrics if "answers_not_finite" in row)["answers_not_finite"] == 4


def test_a_step_most_of_which_is_broken_stops_the_run_with_advice(tmp_path, broken, capsys):
    broken({0, 1, 2, 4, 5})
    assert main(arguments(tmp_path / "run", steps=3)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "10 of 16 answers at step 1" in error and "Lower sigma (now 0.02)" in error
    assert read_steps(tmp_path / "run") == []


def test_other_processes_answers_count_too(tmp_path):
    from strategies import make

    es: ES = make()
    sound = Answers([], [], Rollout([], 0, 0))
    watch_broken(es, StepCounts(10, 0, 0, 0, 0, 0, 5), es.ask(), sound)
    with pytest.raises(ConfigError, match="6 of 10"):
        watch_broken(es, StepCounts(10, 0, 0, 0, 0, 0, 6), es.ask(), sound)
    assert torch.isfinite(es.model.params["head.weight"]).all()


def test_members_whose_reference_answers_cannot_be_read_are_named(capsys):
    from strategies import make

    es: ES = make()
    nothing = Answers([], [], Rollout([], 0, 0))
    reading = Reading([], torch.tensor([[-1.0, -2.0], [-1.0, torch.nan], [torch.nan, torch.nan]]))
    counted = StepCounts(0, 0, 0, 0, 0, 0, broken=3, references=6)
    watch_broken(es, counted, es.ask()._replace(ids=range(4, 7)), nothing, reading)
    assert "step 1: 3 answers ended because the logits were not finite (members 5, 6)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="4 of 6"):
        watch_broken(es, counted._replace(broken=4), es.ask(), nothing, reading)


@pytest.mark.parametrize("in_a_row, is_said", [(0, False), (2, False), (3, True), (4, False), (30, False)])
def test_steps_without_signal_are_said_once_in_a_row(capsys, in_a_row, is_said):
    advise_without_signal(Config(sigma=0.002, prompts=3), in_a_row, torch.zeros(4, 3))
    said = capsys.readouterr().err
    assert said.count("\n") == is_said
    assert ("--sigma 0.008 (now 0.002), --prompts 12 (now 3), --temperature 1" in said) == is_said


def test_what_is_right_already_needs_harder_problems(capsys):
    advise_without_signal(Config(), 3, torch.tensor([[1.0, torch.nan], [1.0, 1.5]]))
    said = capsys.readouterr().err
    assert "harder problems" in said and "--sigma" not in said


def test_a_training_that_does_not_move_says_so_once_and_after_going_on_counts_on(tmp_path, capsys):
    options = {"sigma": 1e-9, "eval_every": 0}  # members answer as the base does
    assert main(arguments(tmp_path / "run", **options, steps=2)) == 0
    assert "WITHOUT SIGNAL" not in capsys.readouterr().err
    assert main(arguments(tmp_path / "run", **options, steps=5)) == 0
    assert capsys.readouterr().err.count("3 STEPS IN A ROW WITHOUT SIGNAL") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps_without_signal"] for row in rows] == [1, 2, 3, 4, 5]


def test_mirrored_members_alike_are_no_signal_whatever_their_fitness(tmp_path, capsys):
    """Raw rewards of a solved task are 1 for all: fitness is not zero, and yet nothing moves."""
    (tmp_path / "one.py").write_text("def one(completion):\n    return 1.0\n")
    options = {"reward": f"{tmp_path}/one.py:one", "fitness": "raw", "eval_every": 0, "steps": 3}
    assert main(arguments(tmp_path / "run", **options)) == 0
    assert "3 STEPS IN A ROW WITHOUT SIGNAL" in capsys.readouterr().err


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """The embedded model with finite weights whose logits overflow."""
    folder = tmp_path_factory.mktemp("overflowing")
    params, _ = load(TINY)
    larger = {name: params[name] * 1e20 for name in ("ln_out.weight", "head.weight")}
    save(folder / "huge.pth", {**params, **larger})
    shutil.copy(TINY.with_name("rwkv7-tiny.tokenizer.json"), folder / "tokenizer.json")
    (folder / "text.txt").write_text("1+2=3")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "eval {}/huge.pth --eval-size 2 --max-new-tokens 4",
        "eval {}/huge.pth --eval-size 2 --max-new-tokens 4 --temperature 1",
        "eval {}/huge.pth --text {}/text.txt",
        "generate 1+2= --model {}/huge.pth --template raw",
        "doctor {}/huge.pth --eval-size 2 --prompts 2 --max-new-tokens 4",
        "train --model {}/huge.pth --population 4 --prompts 2 --max-new-tokens 4 --eval-size 2 --run {}/run --tracker none",
        "chat {}/huge.pth --template raw",
    ],
)
def test_a_model_whose_logits_are_not_finite_is_named_by_every_command(overflowing, command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+2="))
    code = main(
        [*command.format(*[overflowing] * 2).split(), *(["--reward-workers", "0"] if "size" in command else [])]
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert "not finite" in error and "--dtype fp32" in error and "Traceback" not in error
    assert code == (0 if command.startswith("chat") else 2), "a conversation can go on"


def test_a_few_answers_of_a_model_without_noise_are_said_and_go_on(capsys):
    watch_unperturbed(StepCounts(10, 0, 0, 0, 0, 0, 5), "m.pth")
    assert "5 of 10 answers of m.pth were not finite; they score nothing" in capsys.readouterr().err
    watch_unperturbed(StepCounts(10, 0, 0, 0, 0, 0, 0), "m.pth")
    watch_unperturbed(StepCounts(10, 0, 0, 0, 0, 0, 5), "m.pth", False)
    assert capsys.readouterr().err == ""
