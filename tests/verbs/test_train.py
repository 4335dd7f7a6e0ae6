"""Whole runs of the embedded model, small enough for seconds."""

import json
import shutil

import pytest
import torch
from small_runs import SMALL, checksums, run, steps_of

from rwkv_es.config.options import Config, build
from rwkv_es.model.weights import BASE
from rwkv_es.pretrained.checkpoint import load
from rwkv_es.run.ledger import best_weights
from rwkv_es.run.record import chained, read_steps
from rwkv_es.run.snapshots import Best
from rwkv_es.session import answer, open_session
from rwkv_es.system.errors import CheckpointError, ConfigError
from rwkv_es.verbs.export import export
from rwkv_es.verbs.train import as_matrix, draw_problems


def rewrite(folder, steps):
    """Write a ledger whose seals are whole."""
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chained(steps)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "undisturbed")


def test_a_run_that_gets_no_better_stops_early_and_goes_on_when_asked(undisturbed, tmp_path, capsys):
    options = {
        "eval_every": 1,
        "eval_size": 4,
        "max_new_tokens": 2,
        "steps": 6,
        "snapshot_every": 100,
    }  # too short to be right
    folder = run(tmp_path / "patient", **options, patience=2)
    assert "stopped early: 2 held-out evaluations" in capsys.readouterr().out
    assert len(steps_of(folder)) == 2 and (folder / "snapshots" / "step-000002").is_dir()
    run(folder, **options, patience=2)
    assert len(steps_of(folder)) == 2
    run(folder, **options, patience=4)
    assert len(steps_of(folder)) == 4
    run(folder, **options)
    assert len(steps_of(folder)) == 6
    assert checksums(folder) == checksums(run(tmp_path / "undisturbed", **options))


def test_a_run_moves_the_weights_every_step_and_writes_down_what_it_did(undisturbed):
    steps = steps_of(undisturbed)
    assert len(set(checksums(undisturbed))) == 4
    assert all(len(step["rewards"]) == 8 and len(step["rewards"][0]) == 4 for step in steps)
    assert all(any(step["fitness"]) and abs(sum(step["fitness"])) < 1e-9 for step in steps)
    metrics = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "eval/accuracy" in row] == [0, 2, 4]
    samples = [json.loads(line) for line in (undisturbed / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "reward"} <= set(samples[0])
    params, _ = load(undisturbed / "snapshots" / "step-000004" / "model.pth")
    base, _ = load("rwkv_es/tiny/rwkv7-tiny.pth")
    moved = {name for name in params if not (params[name] == base[name]).all()}
    assert "blocks.1.att.key.weight" in moved and "head.weight" in moved
    assert not moved & {"blocks.0.att.v1", "emb.weight", "blocks.1.ln1.weight"}


@pytest.mark.parametrize("options", [{"slots": 8}, {"slots": 24}, {"threads": 2}])
def test_slots_and_threads_never_change_a_bit(undisturbed, tmp_path, options):
    assert checksums(run(tmp_path / "run", **options)) == checksums(undisturbed)


def test_a_run_goes_on_with_the_same_bits_wherever_it_was_stopped(undisturbed, tmp_path):
    for num_steps in (1, 2, 3):
        folder = tmp_path / f"after-{num_steps}"
        shutil.copytree(undisturbed, folder)
        lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
        (folder / "ledger.jsonl").write_text("".join(lines[:num_steps]) + lines[num_steps][:50])  # torn by a crash
        assert checksums(run(folder)) == checksums(undisturbed)


def timeless(row):
    return {name: value for name, value in row.items() if name not in ("time", "elapsed_s")}


def test_what_was_due_when_a_run_was_stopped_is_made_up_for(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "snapshots" / "step-000004")
    whole = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval/reward" in whole[-1]
    (folder / "metrics.jsonl").write_text("".join(whole[:-1]))
    run(folder)
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["elapsed_s"] for row in again] == sorted(row["elapsed_s"] for row in again)
    assert [timeless(row) for row in again] == [timeless(json.loads(line)) for line in whole]
    samples = [(path / "samples.jsonl").read_text() for path in (folder, undisturbed)]
    assert samples[0] == samples[1]
    remade = (folder / "metrics.jsonl").read_text()
    assert (folder / "snapshots" / "step-000004").exists()
    before = {path: path.stat().st_mtime_ns for path in (folder / "snapshots").rglob("*")}
    run(folder)
    assert (folder / "metrics.jsonl").read_text() == remade, "nothing is done twice"
    assert {path: path.stat().st_mtime_ns for path in (folder / "snapshots").rglob("*")} == before


def test_metrics_of_a_step_are_there_once_wherever_a_run_was_stopped(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(lines[:3]))  # as if killed after the metrics of step 4
    run(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward_mean" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 2, 4]


def test_a_tracker_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"tracker trackio is not installed.*--tracker none"):
        run(tmp_path / "run", tracker="trackio")


def test_a_run_goes_on_without_any_snapshot(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "snapshots")
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(lines[:3]))
    assert checksums(run(folder)) == checksums(undisturbed)


def test_recorded_fitness_moves_the_weights_as_exactly_as_it_did(tmp_path, monkeypatch):
    """Differences of a pair must be taken in float64 again: in float32 these two fitnesses are one."""
    exact = torch.tensor([1.0 + 1e-9, 1.0] + [0.0] * 6, dtype=torch.float64)
    monkeypatch.setattr("rwkv_es.es.strategy.shape", lambda rewards, method: exact)
    options = {"lr": 1e6, "schedule": "constant", "snapshot_every": 100, "eval_every": 0}
    whole = checksums(run(tmp_path / "whole", steps=3, **options))
    assert len(set(whole)) == 3
    shutil.copytree(run(tmp_path / "half", steps=2, **options), tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "snapshots")
    assert checksums(run(tmp_path / "again", steps=3, **options)) == whole


def test_a_ledger_that_was_changed_is_noticed(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "snapshots")
    steps = read_steps(folder)
    steps[1].fitness[3] += 0.125
    rewrite(folder, steps[:3])
    with pytest.raises(CheckpointError, match="rebuilt for step 1 have the checksum"):
        run(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": {"state": 300.0}, "temperature": 1.5},
        {"targets": {"vectors": 3.0}, "samples": 3, "temperature": 1.5, "top_p": 0.9, "prompts": 2},
        {"optimizer": "adam", "lr": 0.001, "fitness": "rank", "rank": 4},
        {"weight_decay": 0.5},
        {"dtype": "bf16", "master": "stochastic", "prompts": 2},
        pytest.param({"dtype": "bf16", "master": "fp32"}, marks=pytest.mark.slow),
    ],
)
def test_other_options_train_and_resume_too(tmp_path, options):
    options = {"schedule": "constant", "eval_every": 0, **options}
    whole = checksums(run(tmp_path / "whole", steps=3, **options))
    run(tmp_path / "halves", steps=2, **options)
    assert checksums(run(tmp_path / "halves", steps=3, **options)) == whole
    assert len(set(whole)) > 1, "nothing moved"


def test_equal_rewards_move_nothing(tmp_path):
    folder = run(tmp_path / "run", max_new_tokens=1)  # one token is never an answer
    assert len(set(checksums(folder))) == 1
    assert all(not any(step["fitness"]) for step in steps_of(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps_without_signal"] for row in rows if "reward_mean" in row] == [1, 2, 3, 4]


def test_weights_that_answer_no_better_than_the_base_are_not_the_best(tmp_path, capsys):
    folder = run(tmp_path / "run", max_new_tokens=1, steps=2)
    assert best_weights(folder) == Best(0, 0.0)
    exported, _ = load(export(Config(run=str(folder))))
    base, _ = load("rwkv_es/tiny/rwkv7-tiny.pth")
    assert all(torch.equal(exported[name], base[name]) for name in base)
    assert "better than the model before training" in capsys.readouterr().err


class Hearer:
    """In the place of the scorers: what was taken, and how much at each tick."""

    def __init__(self):
        self.taken, self.counts = {}, []

    def submit(self, place, answer, group):
        self.taken[place] = answer

    def poll(self):
        self.counts.append(len(self.taken))


def test_answers_are_handed_over_while_the_others_are_generated():
    session, hearer = open_session(build({**SMALL, "temperature": 1.5})), Hearer()
    problems = session.task.problems("test")[:40]
    answers = answer(session, problems, BASE._replace(step=5), scorers=hearer)
    assert [hearer.taken[place].text for place in range(40)] == answers.texts
    assert [hearer.taken[place].problem for place in range(40)] == list(problems)
    assert [hearer.taken[place].token_ids for place in range(40)] == answers.token_ids
    assert {taken.step for taken in hearer.taken.values()} == {5}
    assert len(hearer.counts) == answers.rollout.num_ticks and len(set(hearer.counts)) > 3


def test_scoring_meanwhile_and_afterwards_make_the_same_run(undisturbed, tmp_path):
    folder = run(tmp_path / "run", reward_workers=2)
    assert checksums(folder) == checksums(undisturbed)
    assert [step["rewards"] for step in steps_of(folder)] == [step["rewards"] for step in steps_of(undisturbed)]
    assert (folder / "samples.jsonl").read_text() == (undisturbed / "samples.jsonl").read_text()


def test_problems_are_drawn_in_shuffled_passes():
    config = build({**SMALL, "prompts": 4})
    drawn = [problem for step in range(5) for problem in draw_problems(config, list(range(10)), step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] and drawn[:10] != list(range(10))
    other = build({**SMALL, "prompts": 4, "seed": 1})
    assert draw_problems(other, list(range(10)), 0) != drawn[:4]


def test_rewards_are_averaged_over_samples_and_missing_ones_left_out():
    config = build({**SMALL, "population": 2, "prompts": 2, "samples": 2})
    matrix = as_matrix([1.0, 0.0, 0.5, None, None, None, 1.0, 1.0], config)
    assert matrix[0].tolist() == [0.5, 0.5] and matrix[1].isnan().tolist() == [True, False] and matrix[1, 1] == 1
