"""The run folder: nothing is lost by a crash, nothing continues that has become another run."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layered import layers

from rwkv_es.config.file import load_file
from rwkv_es.config.options import Config, build, to_dict
from rwkv_es.es.strategy import Step
from rwkv_es.es.update import checksum
from rwkv_es.run.identity import read_config
from rwkv_es.run.ledger import Ledger, best_weights, read_metrics
from rwkv_es.run.record import packed, read_steps, unpacked
from rwkv_es.run.snapshots import Best, best, latest_snapshot, read_snapshot, snapshot_steps
from rwkv_es.system.errors import CheckpointError, ConfigError

REWARDS = [[0.1, None], [1 / 3, 1.0]]


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.pth"
    torch.save(layers(), path)
    return path


def after(num_steps):
    """The weights after so many steps of these runs."""
    return layers(num_steps / 8)


def step(number):
    return Step(number, REWARDS, [-0.1, 0.1 + 0.2], 0.01, 0.1, 7, 0.25, checksum(after(number + 1)))


def start(base, num_steps=0, **options):
    ledger = Ledger.open(base.parent / "run", to_dict(Config(**options)), base)
    for number in range(ledger.next_step, num_steps):
        ledger.append(step(number))
    return ledger


def lines(base, name):
    return [json.loads(text) for text in (base.parent / "run" / name).read_text().splitlines()]


def test_steps_come_back_exactly(base):
    with start(base, 2) as ledger:
        written = ledger.steps
    with start(base) as ledger:
        assert ledger.steps == written
        assert ledger.next_step == 2
        assert ledger.steps[1].fitness[1] == 0.30000000000000004


def test_a_missing_reward_is_null_in_the_file(base):
    with start(base) as ledger:
        ledger.append(Step(0, [[math.nan, 1.0]], [0.0], 0.1, 0.1, 1, 0.1, ""))
    with start(base) as ledger:
        assert read_steps(base.parent / "run")[0].rewards == [[None, 1.0]]


def test_a_step_out_of_order_is_our_bug(base):
    with start(base, 1) as ledger, pytest.raises(AssertionError):
        ledger.append(step(2))


@pytest.mark.parametrize("torn", [b"{", b'{"step": 2, "rewa', b'{"step": 2}', b"\0\0\0", b"\xff", b"{\n", b"[]\n"])
def test_a_torn_last_line_is_cut_off(base, torn):
    start(base, 2).close()
    path = base.parent / "run" / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with start(base) as ledger:
        assert ledger.next_step == 2
        assert path.read_bytes() == whole
        ledger.append(step(2))
    with start(base) as ledger:
        assert ledger.next_step == 3


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b'{"step": 1, "re', r"ledger\.jsonl line 2 is broken"),
        (b'{"step": 1}', r"ledger\.jsonl line 2 is not step 1"),
        (json.dumps(step(7)._asdict()).encode(), r"ledger\.jsonl line 2 is not step 1"),
    ],
)
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(base, broken, words):
    start(base, 3).close()
    path = base.parent / "run" / "ledger.jsonl"
    rows = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([rows[0], broken, *rows[2:]]))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=words):
        start(base)
    assert path.read_bytes() == before


def test_a_kill_in_the_middle_of_writing_loses_no_finished_step(base):
    code = """
    import os, sys
    from pathlib import Path
    from rwkv_es.config.options import Config, to_dict
    from rwkv_es.run.ledger import Ledger, best_weights, read_metrics, Step
    ledger = Ledger.open(Path(sys.argv[1]), to_dict(Config()), Path(sys.argv[2]))
    for number in range(10**9):
        ledger.append(Step(number, [[0.5] * 2000], [0.25], 0.1, 0.1, 1, 0.1, "x"))
        print(number + 1, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(base.parent / "run"), str(base)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout:
            finished = int(text)
            if finished == 30:
                os.kill(process.pid, signal.SIGKILL)
                break
        finished = max([finished, *map(int, process.stdout.read().split())])
    with start(base) as ledger:
        assert ledger.next_step in (finished, finished + 1)


def test_a_second_process_is_refused_until_the_first_is_done(base):
    with start(base), pytest.raises(ConfigError, match=r"process \d+ on host .* is training in .*; wait for it"):
        start(base)
    start(base).close()


def test_a_refused_open_lets_go_of_the_folder(base):
    start(base, 1).close()
    with pytest.raises(ConfigError, match="sigma"):
        start(base, sigma=0.5)
    start(base).close()


def test_other_options_do_not_continue_a_run(base):
    start(base, 1).close()
    with pytest.raises(ConfigError) as error:
        start(base, sigma=0.5, targets={"vectors": 1.0})
    text = str(error.value)
    assert "sigma 0.001 (now 0.5)" in text
    assert "targets {'matrices': 1.0} (now {'vectors': 1.0})" in text
    assert "choose another --run" in text
    assert text.count("(now") == 2


def test_options_that_leave_the_weights_alone_may_change(base):
    start(base, 1, keep=1).close()
    free = {"steps": 7, "threads": 1, "keep": 5, "snapshot_every": 3, "eval_every": 2, "eval_size": 9}
    with start(base, **free, reward_workers=2) as ledger:
        assert ledger.next_step == 1
        assert ledger.keep == 5
    assert read_config(base.parent / "run")["steps"] == 7


def test_with_a_schedule_the_number_of_steps_belongs_to_the_run(base):
    start(base, 1, schedule="linear").close()
    with pytest.raises(ConfigError, match=r"steps 100 \(now 101\)"):
        start(base, schedule="linear", steps=101)


def test_another_base_checkpoint_does_not_continue_a_run(base):
    start(base, 1).close()
    torch.save(layers(1.0), base)
    with pytest.raises(ConfigError, match=r"base_sha256 [0-9a-f]{64} \(now [0-9a-f]{64}\)"):
        start(base)


def test_a_run_without_a_finished_step_may_be_started_with_other_options(base):
    with start(base) as ledger:
        ledger.write_metrics(0, {"eval/accuracy": 0.5})
    with start(base, sigma=0.5) as ledger:
        assert ledger.next_step == 0
    assert read_config(base.parent / "run")["sigma"] == 0.5
    assert lines(base, "metrics.jsonl") == []


def test_resume_never_refuses_a_folder_with_a_run(base):
    start(base, 0, resume="never").close()
    with pytest.raises(ConfigError, match="holds a run; choose another --run"):
        start(base, resume="never")


def test_the_config_file_makes_the_same_config_and_says_what_it_was_made_with(base):
    config = Config(lr=1e-5, targets={"head.weight": 10.0})
    Ledger.open(base.parent / "run", to_dict(config), base).close()
    run = base.parent / "run"
    assert build(load_file(str(run / "config.yaml"))) == replace(config, run=str(run))
    made_with = read_config(base.parent / "run")["made_with"]
    assert made_with["base_sha256"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert made_with["base"] == str(base)
    built = made_with["torch"].partition("+")[0]  # PyPI's builds have a suffix in the module, not in the package
    assert built == torch.__version__.partition("+")[0]
    assert set(made_with) == {"rwkv_es", "torch", "python", "base", "base_sha256"}


def test_a_folder_without_a_run_or_with_a_damaged_config_is_named(base):
    with pytest.raises(ConfigError, match="holds no run"):
        read_config(base.parent)
    start(base, 1).close()
    (base.parent / "run" / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        read_config(base.parent / "run")


def test_what_was_noted_after_the_last_finished_step_is_dropped_when_a_run_continues(base):
    with start(base, 3) as ledger:
        for number in range(4):
            ledger.write_metrics(number, {"reward_mean": number / 10})
            ledger.write_samples(number, [{"prompt": "p", "reward": math.nan}] * 2)
    path = base.parent / "run" / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with start(base) as ledger:
        assert ledger.next_step == 2
    assert [row["step"] for row in lines(base, "metrics.jsonl")] == [0, 1, 2]
    assert [row["step"] for row in lines(base, "samples.jsonl")] == [0, 0, 1, 1, 2, 2]
    assert lines(base, "samples.jsonl")[0]["reward"] is None


def test_samples_hold_any_text(base):
    text = "数 \u2028 \ud800 \0 \n </pre>"
    with start(base) as ledger:
        ledger.write_samples(0, [{"completion": text}])
    rows = (base.parent / "run" / "samples.jsonl").read_bytes().split(b"\n")
    assert json.loads(rows[0])["completion"] == text
    assert "数".encode() in rows[0]
    assert rows[1:] == [b""]


def test_snapshots_come_back_and_old_ones_go_but_not_the_best(base):
    optimizer = {"a": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    with start(base, 6, keep=2) as ledger:
        assert ledger.latest_snapshot() is None
        assert not ledger.is_best(math.nan)
        for number in range(1, 7):
            ledger.save_snapshot(number, after(number), optimizer, 0.75 if number == 2 else None)
        assert ledger.best() == Best(2, 0.75)
        assert not ledger.is_best(0.75)
        assert ledger.is_best(0.76)
        found = ledger.latest_snapshot()
    assert found.step == 6
    assert found.params["emb.weight"].unique().item() == 6 / 8
    assert list(found.params) == list(layers())
    torch.testing.assert_close(found.optimizer, optimizer)
    folder = base.parent / "run" / "snapshots"
    assert sorted(p.name for p in folder.iterdir()) == ["best.json", "step-000002", "step-000005", "step-000006"]
    assert sorted(p.name for p in (folder / "step-000006").iterdir()) == ["meta.json", "model.pth", "optimizer.pt"]
    assert read_snapshot(base.parent / "run", 2).params["emb.weight"][0, 0].item() == 2 / 8


def test_a_snapshot_can_be_taken_again(base):
    with start(base, 1) as ledger:
        ledger.save_snapshot(1, layers(0.5), {})
        ledger.save_snapshot(1, after(1), {})
        assert ledger.latest_snapshot().params["emb.weight"][0, 0].item() == 1 / 8


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt"])
@pytest.mark.parametrize("how", ["cut", "gone", "other"])
def test_a_damaged_snapshot_is_passed_over_for_the_one_before(base, capsys, name, how):
    with start(base, 2) as ledger:
        ledger.save_snapshot(1, after(1), {})
        ledger.save_snapshot(2, after(2), {})
        path = base.parent / "run" / "snapshots" / "step-000002" / name
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if how == "cut" else b"hello")
        assert ledger.latest_snapshot().step == 1
    err = capsys.readouterr().err
    assert "passed over" in err
    assert "step-000002" in err


def test_an_interrupted_snapshot_is_not_seen_and_is_cleared_away(base, monkeypatch):
    with start(base, 2) as ledger:
        ledger.save_snapshot(1, after(1), {}, 0.5)
        monkeypatch.setattr(
            "rwkv_es.run.snapshots._save_optimizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            ledger.save_snapshot(2, after(2), {}, 0.75)
        assert ledger.latest_snapshot().step == 1
        assert ledger.best() == Best(1, 0.5)
    with start(base):
        assert sorted(p.name for p in (base.parent / "run" / "snapshots").iterdir()) == ["best.json", "step-000001"]


def test_snapshots_of_steps_that_the_ledger_has_lost_are_dropped(base):
    with start(base, 2) as ledger:
        ledger.save_snapshot(1, after(1), {})
        ledger.save_snapshot(2, after(2), {}, 1.0)
    path = base.parent / "run" / "ledger.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with start(base) as ledger:
        assert ledger.latest_snapshot().step == 1
        assert ledger.best() is None


def test_snapshots_without_a_ledger_are_left_alone(base):
    with start(base, 1) as ledger:
        ledger.save_snapshot(1, after(1), {})
    (base.parent / "run" / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"has snapshots but no ledger\.jsonl"):
        start(base)
    assert latest_snapshot(base.parent / "run").step == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 9, "score": 1}', '{"step": "x", "score": 1}', '{"step": 1}'])
def test_a_damaged_note_of_the_best_names_none(base, text):
    with start(base, 1) as ledger:
        ledger.save_snapshot(1, after(1), {})
    (base.parent / "run" / "snapshots" / "best.json").write_text(text)
    assert best(base.parent / "run") is None


def test_a_folder_that_cannot_be_written_is_one_sentence(base):
    (base.parent / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file/run \(Not a directory\)"):
        Ledger.open(base.parent / "file" / "run", to_dict(Config()), base)


@pytest.mark.parametrize("file", ["model.pth", "optimizer.pt"])
def test_a_snapshot_that_finds_no_room_takes_none(base, monkeypatch, file):
    save = torch.save

    def full(values, place, *given):
        save(values, place, *given)
        if file in str(getattr(place, "name", place)):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with start(base, 1) as ledger:
        with pytest.raises((CheckpointError, ConfigError), match="not all of it found room: the disk is full"):
            ledger.save_snapshot(1, after(1), {})
        assert os.listdir(ledger.folder / "snapshots") == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_sentence(base):
    ledger = start(base)
    path = base.parent / "run" / "ledger.jsonl"
    path.unlink()
    path.symlink_to("/dev/full")
    with (
        ledger,
        pytest.raises(ConfigError, match=r"cannot write .*ledger.jsonl \(No space left on device\); make room"),
    ):
        ledger.append(step(0))
    assert ledger.steps == []


def test_a_snapshot_with_other_weights_than_the_ledger_says_is_passed_over(base, capsys):
    with start(base, 2) as ledger:
        ledger.save_snapshot(1, after(1), {})
        ledger.save_snapshot(2, layers(0.75), {})  # a copy under another step's name, say
        assert ledger.latest_snapshot().step == 1
    assert "other weights than the ledger says" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_best_snapshot_that_is_lost_is_built_again_from_one_before(base, how):
    with start(base, 3, keep=5) as ledger:
        for number in range(1, 4):
            ledger.save_snapshot(number, after(number), {}, 0.5 if number == 2 else None)
        path = base.parent / "run" / "snapshots" / "step-000002"
        assert ledger.lost_best() is None
        (path / "model.pth").write_bytes(b"hello")
        if how == "gone":
            shutil.rmtree(path)
        assert ledger.lost_best() == 2 and ledger.latest_snapshot().step == 1
        ledger.restore_best(after(2), {}, 2)
        assert ledger.lost_best() is None and ledger.best() == Best(2, 0.5) and ledger.latest_snapshot().step == 3


def test_a_kill_while_a_snapshot_is_removed_leaves_nothing_half_deleted(base, monkeypatch):
    ledger = start(base, 4, keep=1)
    ledger.save_snapshot(1, after(1), {})
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: path.name.endswith("removed") and path.exists() and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ledger.save_snapshot(2, after(2), {})
    monkeypatch.undo()
    ledger.close()
    folder = base.parent / "run" / "snapshots"
    assert sorted(p.name for p in folder.glob("step-*")) == ["step-000002"]
    start(base).close()
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002"]


def test_damaged_lines_of_what_nothing_depends_on_block_no_resume(base):
    with start(base, 2) as ledger:
        for number in range(3):
            ledger.write_metrics(number, {"eval/reward": number / 4})
            ledger.write_samples(number, [{"completion": "a"}])
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = base.parent / "run" / name
        rows = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join([rows[0], b"\xff{dam", *rows[1:]]) + b"torn")
    with start(base) as ledger:
        assert ledger.held_out(2) == 0.5
    kept = (base.parent / "run" / "metrics.jsonl").read_bytes().split(b"\n")
    assert len(kept) == 5 and kept[1] == b"\xff{dam" and kept[-1] == b""


def test_many_rewards_are_packed_exactly_and_small(base):
    generator = np.random.default_rng(0)
    zeros_and_ones = generator.integers(0, 2, (256, 64)).astype(float)
    zeros_and_ones[3, 5] = math.nan
    with start(base) as ledger:
        ledger.append(step(0)._replace(rewards=zeros_and_ones.tolist()))
        assert not ledger.steps[0].rewards, "nothing in memory"
    line = (base.parent / "run" / "ledger.jsonl").read_bytes()
    assert (
        len(line) < 4000
    )  # 65,000 as a list; two bits each are 4,096 bytes, of which the second ones are nearly all 0
    np.testing.assert_array_equal(np.array(unpacked(read_steps(base.parent / "run")[0].rewards), float), zeros_and_ones)
    any_floats = generator.standard_normal((40, 40)) * 10.0 ** generator.integers(-300, 300, (40, 40))
    assert isinstance(packed(any_floats.tolist()), str) and unpacked(packed(any_floats.tolist())) == any_floats.tolist()
    with start(base) as ledger:
        assert ledger.next_step == 1


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "report.html", "base.pth", "base.tokenizer.json", "snapshots"]
)
def test_a_run_does_not_start_among_files_that_no_run_has_made(base, name):
    folder = base.parent / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("not in the way")
    (folder / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which no run has made"):
        start(base)
    assert (folder / name).read_text() == "mine"
    (folder / name).unlink()
    start(base).close()
    assert (folder / "notes.txt").read_text() == "not in the way"


def test_a_run_beside_its_base_is_refused_at_once(base):
    with pytest.raises(ConfigError, match="would replace the base"):
        Ledger.open(base.parent, to_dict(Config()), base)
    assert not (base.parent / "ledger.jsonl").exists()


@pytest.mark.parametrize("option", ["slots", "reward_timeout", "reward_error_limit"])
def test_what_messages_advise_to_change_may_change(base, option):
    start(base, 1).close()
    start(base, **{option: 0.25 if option == "reward_error_limit" else 8}).close()


def test_a_moved_base_and_an_option_of_a_later_release_continue(base):
    start(base, 1).close()
    moved = base.rename(base.with_name("moved.pth"))
    path = base.parent / "run" / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "top_k" not in line))
    options = to_dict(Config(model=str(moved)))
    Ledger.open(base.parent / "run", options, moved).close()
    with pytest.raises(ConfigError, match=r"top_k 0 \(now 3\)"):
        Ledger.open(base.parent / "run", {**options, "top_k": 3}, moved)


def test_changed_contents_are_said_and_begin_a_new_best(base):
    def opened(digest, **more):
        contents = {"problems_sha256": digest, "reward_sha256": "r", **more}
        return Ledger.open(base.parent / "run", to_dict(Config()), base, contents)

    with opened("a") as ledger:
        ledger.append(step(0))
        ledger.write_metrics(0, {"eval/reward": 0.25})
        ledger.write_metrics(1, {"eval/reward": 0.5})
        ledger.save_snapshot(1, after(1), {}, 0.5)
    with opened("a") as ledger:
        assert ledger.changed == [] and ledger.best() == Best(1, 0.5)
    with opened("b") as ledger:
        assert ledger.changed == ["the task's problems"]
        assert ledger.best() is None and ledger.is_best(0.1), "neither the snapshot nor the score before training"
        ledger.append(step(1))
        ledger.write_metrics(2, {"eval/reward": 0.1})
        ledger.save_snapshot(2, after(2), {}, 0.1)
    with opened("b") as ledger:
        assert ledger.changed == [] and ledger.best() == Best(2, 0.1) and ledger.num_evaluations_since_best() == 0


@pytest.mark.parametrize("text", ["", "mine, without an end", '{"date": 1}', '{"date": 1}\n{"torn'])
def test_a_ledger_of_somebody_elses_is_not_touched(base, text):
    folder = base.parent / "run"
    folder.mkdir()
    (folder / "ledger.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"holds ledger\.jsonl, which no run has made"):
        start(base)
    assert (folder / "ledger.jsonl").read_text() == text
    assert sorted(path.name for path in folder.iterdir()) == ["ledger.jsonl"]


def test_a_ledger_that_was_changed_is_refused_before_anything_is_cut_off(base):
    start(base, 2).close()
    path = base.parent / "run" / "ledger.jsonl"
    changed = path.read_bytes().replace(b"0.25", b"0.75") + b"torn"
    path.write_bytes(changed)
    with pytest.raises(ConfigError, match="seal is broken"):
        start(base)
    assert path.read_bytes() == changed


def test_snapshots_that_a_kill_left_over_stay_until_it_is_written_down_which_is_the_best(base):
    with start(base, 4, keep=4) as ledger:
        for number in (1, 2, 3, 4):
            ledger.save_snapshot(number, after(number), {}, 0.5 if number == 1 else None)
    with start(base, keep=1) as ledger:
        assert snapshot_steps(base.parent / "run") == [1, 2, 3, 4]
        ledger.prune()
    assert snapshot_steps(base.parent / "run") == [1, 4]


def test_a_snapshot_under_another_steps_name_is_no_snapshot(base):
    with start(base, 4, keep=4) as ledger:
        ledger.save_snapshot(4, after(4), {})
    folder = base.parent / "run" / "snapshots"
    (folder / "step-000004").rename(folder / "step-000002")
    with pytest.raises(CheckpointError):
        read_snapshot(base.parent / "run", 2)


def test_a_damaged_last_snapshot_does_not_count_as_there(base):
    with start(base, 2) as ledger:
        ledger.save_snapshot(2, after(2), {})
        assert ledger.has_snapshot(2)
        (base.parent / "run" / "snapshots" / "step-000002" / "model.pth").write_bytes(b"")
        assert not ledger.has_snapshot(2)
        ledger.save_snapshot(2, after(2), {})
        assert ledger.has_snapshot(2)


def test_a_damaged_note_of_the_best_is_made_up_from_the_metrics(base):
    with start(base, 3, keep=5) as ledger:
        for number, score in ((1, 0.25), (2, 0.75), (3, 0.5)):
            ledger.save_snapshot(number, after(number), {}, score if number < 3 else None)
            ledger.write_metrics(number, {"eval/reward": score})
    (base.parent / "run" / "snapshots" / "best.json").write_text("{")
    assert best_weights(base.parent / "run") == Best(2, 0.75)


def test_a_renamed_reward_continues_and_another_number_of_held_out_problems_begins_a_new_best(base):
    contents = {"reward_sha256": "same"}
    run = base.parent / "run"
    with Ledger.open(run, to_dict(Config(reward="a.py:f=0.5")), base, contents) as ledger:
        ledger.append(step(0))
    with Ledger.open(run, to_dict(Config(reward="moved/b.py:f=0.5")), base, contents) as ledger:
        assert ledger.changed == []
    with Ledger.open(run, to_dict(Config(reward="moved/b.py:f=0.5", eval_size=7)), base, contents) as ledger:
        assert ledger.changed == ["the number of held-out problems (eval_size)"]


def test_a_step_that_another_process_has_taken_over_is_not_written(base):
    with start(base, 1) as ledger:
        (base.parent / "run" / ".rwkv-es-lock.json").write_text('{"token": "another", "host": "node7", "pid": 3}')
        for write in (lambda: ledger.append(step(1)), lambda: ledger.save_snapshot(1, after(1), {})):
            with pytest.raises(ConfigError, match="process 3 on host node7 has taken over"):
                write()
    assert len(read_steps(base.parent / "run")) == 1 and snapshot_steps(base.parent / "run") == []


def test_evaluations_of_a_run_of_an_earlier_release_are_read_under_todays_names(base):
    with start(base, 2) as ledger:
        ledger.save_snapshot(2, after(2), {})
        ledger.write_metrics(0, {"held_out_reward": 0.25})
        ledger.write_metrics(2, {"held_out_reward": 0.5, "reward_mean": 0.1})
        assert ledger.held_out(2) == 0.5 and ledger.num_evaluations_since_best() == 0
    row = read_metrics(base.parent / "run")[1]
    assert row.pop("time") > 1e9 and row.pop("elapsed_s") >= 0
    assert row == {"step": 2, "eval/reward": 0.5, "reward_mean": 0.1}


def test_held_out_answers_without_their_evaluation_are_dropped_since_it_is_made_again(base):
    with start(base, 2) as ledger:
        for number in (0, 2):
            ledger.write_samples(number, [{"kind": "held out", "prompt": "p"}, {"kind": "best", "prompt": "p"}])
        ledger.write_metrics(0, {"eval/reward": 0.25})
    with start(base):
        pass
    kept = [(row["step"], row["kind"]) for row in lines(base, "samples.jsonl")]
    assert kept == [(0, "held out"), (0, "best"), (2, "best")]


def test_the_seconds_of_a_run_go_on_where_they_were_and_leave_pauses_out(base, monkeypatch):
    with start(base, 2) as ledger:
        monkeypatch.setattr("rwkv_es.run.ledger.time", SimpleNamespace(monotonic=lambda: ledger._began + 50, time=int))
        ledger.write_metrics(1, {})
    monkeypatch.setattr("rwkv_es.run.ledger.time", SimpleNamespace(monotonic=lambda: 1e6, time=int))
    with start(base) as ledger:
        monkeypatch.setattr("rwkv_es.run.ledger.time", SimpleNamespace(monotonic=lambda: 1e6 + 7, time=int))
        ledger.write_metrics(2, {})
    assert [row["elapsed_s"] for row in lines(base, "metrics.jsonl")] == [50, 57]
