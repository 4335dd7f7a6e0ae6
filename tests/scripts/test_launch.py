"""The launch files: what the documented commands start, and what becomes of it when it is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from places import ROOT

from rwkv_es.run.launcher import SILENT_S
from rwkv_es.run.record import read_steps

LAUNCH = ROOT / "scripts" / "launch"
RUN = "--population 8 --prompts 2 --max-new-tokens 40 --eval-every 0 --steps 3 --sigma 0.02 --threads 1 --device cpu"


def launch(folder, *more):
    config = ["--config_file", str(LAUNCH / "cpu.yaml"), "--max_restarts", "9"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "-m", "rwkv_es", "train", *RUN.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return outcome([*command, "--run", str(folder), *more], 120, environment)


def outcome(argv, timeout_s, environment=None):
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": timeout_s, "env": environment}
    return subprocess.run(argv, check=False, **settings)


@pytest.mark.slow  # that two processes train together is in test_cluster, that the launcher starts them below
def test_the_launcher_starts_two_processes_that_log_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    done = launch(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(read_steps(tmp_path / "run")) == 3
    assert "wait_s_of_rank_1" in (tmp_path / "run" / "metrics.jsonl").read_text()
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"reward_mean" in events.read_bytes()


@pytest.mark.slow
def test_a_users_mistake_is_not_tried_again(tmp_path):
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    done = launch(tmp_path / "file" / "run")
    assert time.monotonic() - began < SILENT_S, "no process waited for another to speak"
    assert done.returncode != 0
    assert done.stderr.count("rwkv-es: cannot write") == 1


def test_an_option_that_cannot_be_is_said_once_and_ends_the_launcher(tmp_path):
    done = launch(tmp_path / "run", "--population", "7")
    assert done.returncode != 0
    assert done.stderr.count("population must be even") == 1


def test_the_launch_files_are_understood_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted(LAUNCH.glob("*.yaml")):
        load_config_from_file(str(path))
        values = yaml.safe_load(path.read_text())
        per_machine = values["num_processes"] / values["num_machines"]
        assert per_machine == {"cpu": 2, "gpu1": 1, "gpu8": 8, "nodes4x8": 8}[path.stem]
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")], check=True)


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_kills_leave_the_same_bits(kills, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from kill_test import main

    few = [
        "--kills",
        str(kills),
        "--steps",
        str(kills + 2),
        "--longest",
        "0.2",
        "--score-seconds",
        "0.05",
        "--seed",
        "5",
    ]
    assert main(few) == 0
    assert "the same bits in every step, and replay agrees" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/sbin/ip").exists(), reason="needs root and iproute2")
def test_two_nodes_exchange_few_bytes_whatever_the_model():
    script = str(ROOT / "scripts" / "two_nodes.py")
    done = outcome([sys.executable, script, "--large"], 1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0.1B-shaped:" in done.stdout
