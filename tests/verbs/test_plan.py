"""What a run takes, before anything is loaded: against figures written by hand, and by taking the plan's advice."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoints import random_params

from rwkv_es.api import load_task
from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.es.strategy import ES
from rwkv_es.model.forward import Model
from rwkv_es.planning.out_of_memory import explaining_out_of_memory
from rwkv_es.planning.plan import alternatives, disk_of, make_plan, wire_bytes
from rwkv_es.planning.text import duration, plan_lines, size
from rwkv_es.planning.walk import walk
from rwkv_es.pretrained.checkpoint import Arch
from rwkv_es.pretrained.header import SIZES
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.task import Problem

CARDS = ("rtx4090-24", "l40s-48", "h100-80", "h200-141")


def planned(**options):
    return make_plan(Config(max_new_tokens=1024, **options))


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("model", SIZES)
def test_every_size_on_every_card_fits_or_says_what_to_change(model, card):
    made = planned(model=model, gpus=card, population=1024)
    text = "\n".join(plan_lines(made))
    assert made.fits == ("DOES NOT FIT" not in text)
    assert (made.memory.peak <= made.device.memory) == made.fits == (made.load.slots <= made.most)
    if not made.fits:
        assert "change: " in text
        if made.most:
            assert planned(model=model, gpus=card, population=1024, slots=made.most).fits
        for option, slots in alternatives(made).items():
            values = dict(zip(option.replace("--", "").replace("-", "_").split()[::2], option.split()[1::2]))
            assert planned(model=model, gpus=card, population=1024, slots=slots, **values).fits


def test_several_changes_are_proposed_where_one_is_not_enough():
    options = {"model": "13.3b", "gpus": "rtx4090-24", "optimizer": "adam"}  # weights 26.5 GB, moments 102 GB
    assert list(alternatives(planned(**options))) == ["--quantize int8 --optimizer sgd"]
    assert planned(**{**options, "optimizer": "sgd"}, quantize="int8", slots=8).fits
    assert alternatives(planned(**{**options, "gpus": "4gb"})) == {}
    assert "a smaller model" in "\n".join(plan_lines(planned(**{**options, "gpus": "4gb"})))


def test_what_fits_which_card():
    """Weights of 13.3B in bf16 are 26.5 GB, of 7.2B 14.4 GB: facts that no engine changes."""
    assert not planned(model="13.3b", gpus="rtx4090-24").most
    assert planned(model="13.3b", gpus="rtx4090-24", quantize="int8").most
    assert planned(model="7.2b", gpus="rtx4090-24").most
    most = [planned(model="7.2b", gpus=card).most for card in CARDS]
    assert most == sorted(most)


def test_thousands_of_7b_generations_on_eight_gpus(capsys):
    assert main(["plan", "7.2b", "--gpus", "8xh100-80", "--max-new-tokens", "1024"]) == 0
    text = capsys.readouterr().out
    alike, apart = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) in all", text)[:2])
    assert alike >= apart >= 8192
    assert "predicted, not measured" in text


def lines_of(**options):
    return plan_lines(make_plan(Config(**options)))


def test_an_episode_is_as_long_as_its_limits_and_its_state_waits():
    """20 answers of 3 tokens and as many tokens of replies, as tasks/guess_mini says; five turns of the same make 30."""
    made = make_plan(Config(model="tiny", task="guess_mini", population=64))
    assert (made.asked.sampled.answers, made.asked.sampled.new_tokens, made.asked.told) == (512, 120, None)
    assert made.memory.saved == 2 * made.memory.states
    assert "512 episodes a step, of at most 120 tokens" in lines_of(model="tiny", task="guess_mini", population=64)[1]
    assert make_plan(Config(model="tiny", task="guess_mini", max_turns=5)).asked.sampled.new_tokens == 30


@pytest.mark.parametrize(("options", "engine"), [({"device": "cpu"}, "numba"), ({"gpus": "h100-80"}, "torch")])
def test_layer_norms_are_planned_with_the_engine_that_can_perturb_them(options, engine):
    text = "\n".join(lines_of(model="tiny", task="countdown_mini", targets={"blocks.*.ln1.*": 1.0}, **options))
    assert f"engine {engine}," in text


def test_on_a_gpu_environments_are_planned_with_the_engine_that_has_turns():
    text = "\n".join(lines_of(model="0.1b", task="maze", gpus="h100-80"))
    assert "engine torch" in text and "change: --engine torch, which environments need on a GPU" in text
    assert "change" not in "\n".join(lines_of(model="0.1b", task="maze", gpus="h100-80", engine="torch", lr=1e-4))


def test_reference_answers_are_read_once_a_member_and_take_time_beside_the_samples():
    options = {"model": "1.5b", "gpus": "h100-80", "samples": 4, "population": 64, "prompts": 2, "max_new_tokens": 100}
    alone, told, both = (
        make_plan(Config(**options, objective=objective)) for objective in ("mean", "logprob", "outcome=1,logprob=0.1")
    )
    assert (alone.asked.sampled.answers, alone.asked.told) == (64 * 2 * 4, None)
    assert (told.asked.sampled, told.asked.told.answers) == (None, 64 * 2)
    assert both.times.generate_s == pytest.approx(alone.times.generate_s + told.times.generate_s)
    assert both.times.update_s == alone.times.update_s == told.times.update_s
    assert both.evaluation.generate_s == pytest.approx(alone.evaluation.generate_s + told.evaluation.generate_s)
    assert both.times.tokens_per_s == pytest.approx((64 * 8 + 64 * 2) * 228 / both.times.generate_s)
    assert told.memory.logits > alone.memory.logits
    assert "128 reference answers read a step" in "\n".join(plan_lines(told))
    assert make_plan(Config(**options, objective="outcome=0,logprob=1")).asked.sampled is None


def test_an_evaluation_of_more_answers_than_a_step_has_is_what_memory_must_hold():
    step, evaluated = (planned(model="0.1b", gpus="h100-80", population=8, prompts=2, eval_every=k) for k in (0, 10))
    assert (step.load.slots, evaluated.load.slots) == (16, 200)
    assert evaluated.memory.states == 200 / 16 * step.memory.states
    assert evaluated.times.generate_s == pytest.approx(step.times.generate_s)
    assert planned(model="0.1b", gpus="8xh100-80", population=16, prompts=2).load.slots == 25


def test_processes_share_the_members_but_not_the_weights():
    one, eight = planned(model="1.5b", gpus="h100-80"), planned(model="1.5b", gpus="8xh100-80")
    assert eight.memory.weights == one.memory.weights
    assert eight.memory.factors * 8 == one.memory.factors
    assert eight.times.generate_s < one.times.generate_s


def test_bytes_on_the_wire_and_on_the_disk_by_hand():
    made = planned(model="0.1b", gpus="4xh100-80", population=64, prompts=3, keep=5)
    assert wire_bytes(made) == 3 * 8 * 64 * 3 + 4 * 100
    assert wire_bytes(planned(model="0.1b", gpus="h100-80")) == 0
    disk = disk_of(made)
    assert disk.snapshot == pytest.approx(191_034_624 * 4, rel=1e-3)  # fp32 masters are what a snapshot keeps
    assert disk.snapshots == 7 * disk.snapshot  # five, the best one, and one being written
    assert disk.export == pytest.approx(191_034_624 * 2, rel=1e-3)
    assert disk_of(planned(model="0.1b", gpus="h100-80", master="stochastic")).snapshot == disk.export


def test_the_walk_by_hand():
    step, total = walk(Config(lr=1e-3, population=256, steps=100))
    assert step == pytest.approx(1e-3 / 16)
    assert total == pytest.approx(1e-3 / 16 * 10)
    step, total = walk(
        Config(lr=1e-3, population=256, steps=3, schedule="linear", schedule_end=0.5, targets={"head.weight": 4.0})
    )
    assert step == pytest.approx(4e-3 / 16)
    assert total == pytest.approx(4e-3 / 16 * (1 + 0.75**2 + 0.25) ** 0.5)
    assert walk(Config(fitness="raw")) is None
    assert walk(Config(optimizer="adam")) is None


@pytest.mark.parametrize("num_problems", [1, 4])
def test_a_step_is_as_long_as_the_walk_says(num_problems):
    model = Model(random_params(2, 128, 50), Arch(2, 128, 2, 64, 50, 512, 8, 8, 8, 16))
    es, lengths = ES(model, population=64, sigma=0.01, lr=0.02), []
    for seed in range(4):
        rewards = torch.rand(64, num_problems, generator=torch.Generator().manual_seed(seed))
        lengths.append(es.tell(rewards).step_rms_per_sigma * 0.01)
    most, _ = walk(Config(lr=0.02, population=64))
    assert sum(lengths) / 4 == pytest.approx(most / num_problems**0.5, rel=0.15)  # 256 members would be within 7 %


def test_a_long_walk_is_said():
    text = "\n".join(plan_lines(planned(model="0.1b", gpus="h100-80", lr=1e-2)))
    (lr,) = re.findall(r"change: --lr (\S+),", text)
    assert walk(Config(lr=float(lr)))[1] <= 1.05e-3


def test_the_rate_is_said_as_others_count_it():
    text = "\n".join(plan_lines(planned(model="0.1b", gpus="h100-80", lr=1e-3, population=100, prompts=4, sigma=1e-3)))
    assert "lr_scale 0.05 to 0.1 in HyperscaleES, 0.0005 to 0.001 in es-at-scale" in text  # 1e-3 / (1e-3 * 10), halved


def test_a_small_models_weights_may_walk_as_far_as_they_like():
    (line,) = [line for line in plan_lines(planned(model="tiny", lr=1e-2)) if line.startswith("walk")]
    assert "stay below" not in line and "as a random walk by 0.0063" in line  # 0.00625 = 1e-2 / sqrt(256) * sqrt(100)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (950, "950 B"),
        (12_340, "12.3 kB"),
        (9_994_000, "9.99 MB"),
        (999_600, "1.00 MB"),
        (14.42e9, "14.4 GB"),
        (230e9, "230 GB"),
    ],
)
def test_sizes(number, text):
    assert size(number) == text


def test_durations():
    assert [duration(seconds) for seconds in (0.123, 34, 339, 28_000)] == ["0.12 s", "34 s", "5.65 min", "7.78 h"]


def grab(what):
    if what == "torch":
        return torch.empty(1 << 55)
    if what == "python":
        return bytearray(1 << 60)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("what", ["torch", "python", "cuda"])
def test_running_out_of_memory_is_one_sentence_with_numbers_and_a_way_out(what, monkeypatch):
    monkeypatch.setattr("rwkv_es.planning.out_of_memory._HOPELESS", math.inf)
    config = Config(population=1 << 16, prompts=64, slots=1 << 22, device="cpu")
    with pytest.raises(ConfigError) as caught, explaining_out_of_memory(config):
        grab(what)
    assert re.match(
        r"out of memory: 4,194,304 generations in flight of rwkv7-tiny.pth take about \d+ GB and", str(caught.value)
    )
    (slots,) = re.findall(r"try --slots (\d+)", str(caught.value))
    assert make_plan(Config(population=1 << 16, prompts=64, slots=int(slots) * 9 // 10, device="cpu")).fits


@pytest.mark.parametrize(
    "options", [{"rank": 10**12}, {"population": 1 << 23, "prompts": 2}, {"population": 1 << 20, "rank": 4096}]
)
def test_what_no_machine_can_hold_is_refused_before_anything_is_loaded(options):
    config = Config(device="cpu", **options)
    with pytest.raises(ConfigError, match=r"out of memory: .* take about \d+"), explaining_out_of_memory(config):
        raise AssertionError("it has begun")


def test_a_task_that_is_a_python_object_runs_out_of_memory_as_well():
    own = load_task([Problem("1+1=", "2")], lambda problem, text: 1.0)
    with pytest.raises(ConfigError, match="out of memory"), explaining_out_of_memory(Config(task="own"), own):
        raise MemoryError


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explaining_out_of_memory(Config()):
        raise RuntimeError("shapes do not match")


def dry_run(capsys, *argv):
    code = main(["train", *argv, "--dry-run"])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_dry_run_is_a_config_with_the_plan_as_comments(capsys):
    code, out, err = dry_run(capsys, "--model", "tiny", "--steps", "7", "--device", "cpu")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["steps"] == 7
    comments = [line for line in out.splitlines() if line.startswith("# ")]
    assert any("peak, while" in line for line in comments)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "none.pth"], "none.pth' does not exist"),
        (["--task", "countdwn"], "countdwn"),
        (["--task", "jsonl", "--data", "none.jsonl"], "none.jsonl"),
        (["--reward", "none.py:reward"], "none.py"),
        (["--targets", "matrixes=1"], "matrixes"),
        (["--task", "jsonl", "--data", "few.jsonl"], "prompts is 8, but the task has 3 training problems"),
    ],
)
def test_a_dry_run_says_what_is_missing(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 3)
    code, out, err = dry_run(capsys, *argv)
    assert code == 2
    assert "steps" in yaml.safe_load(out)  # the options were printed
    assert words in err
    assert err.count("\n") == 1


def test_a_plan_of_a_file_needs_no_torch():
    code = (
        "import sys, rwkv_es.cli as c; c.main(['plan', 'tiny', '--gpus', 'h100-80']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_gpus_are_not_measured_here(capsys):
    assert main(["plan", "0.1b", "--gpus", "h100-80", "--measure"]) == 2
    assert "measure times this machine's CPU" in capsys.readouterr().err


def test_a_run_whose_snapshots_find_no_room_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=3_000_000))
    words = r"will take 6\.26 MB \(a snapshot is 1\.02 MB, 4 kept or being written\) and 3\.00 MB are free"
    with pytest.raises(ConfigError, match=words), explaining_out_of_memory(Config(run=str(tmp_path / "run"), steps=40)):
        raise AssertionError("nothing may begin")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "earlier").write_bytes(bytes(4_000_000))  # what is there will be replaced, or stays as it is
    with explaining_out_of_memory(Config(run=str(tmp_path / "run"), steps=40)):
        pass
