"""Trackers: whatever they raise is one sentence, they are closed in the end, and a folder is no package."""

import sys
from typing import ClassVar

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from jobs import arguments

from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.measure import tracker
from rwkv_es.measure.tracker import open_tracker
from rwkv_es.system.errors import ConfigError


class Stub:
    """A service that notes its calls, and fails in one of them."""

    calls: ClassVar[list[str]] = []
    fails_in = ""

    def __init__(self, *arguments, **named):
        self.call("init")

    def call(self, name):
        Stub.calls.append(name)
        if name == Stub.fails_in:
            raise RuntimeError(f"no\n{name} today")

    def start(self):
        from accelerate.logging import get_logger

        get_logger("stub").debug("started")  # as accelerate's own trackers do: it fails where there is no state
        self.call("start")

    def log(self, values, step):
        self.call(f"log {step}")

    def finish(self):
        self.call("finish")


@pytest.fixture
def stub(monkeypatch):
    PartialState._reset_state()
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Stub)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Stub)
    monkeypatch.setattr(tracker, "_is_installed", lambda name: True)
    monkeypatch.setattr(Stub, "calls", [])
    monkeypatch.setattr(Stub, "fails_in", "")
    yield Stub
    PartialState._reset_state()


ALONE = {"OMPI_COMM_WORLD_SIZE": "4", "LOCAL_RANK": "2", "PMI_SIZE": "2", "ACCELERATE_TORCH_DEVICE": "nonsense"}


@pytest.mark.parametrize("environment", [{}, ALONE])
def test_a_single_process_has_what_trackers_need_whatever_started_it(stub, tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with open_tracker(Config(tracker="wandb"), tmp_path, 0) as opened:
        opened.log({"reward": 1.0}, step=3)
    assert stub.calls == ["init", "start", "log 3", "finish"]


def test_numbers_come_in_groups_and_answers_as_a_table_where_there_are_tables(stub, tmp_path, monkeypatch):
    told = []
    sample = {"kind": "best", "prompt": "2+2?", "completion": "4", "reward": 1.0}
    monkeypatch.setattr(stub, "log", lambda self, values, step: told.append((values, step)))
    for name, has_tables in (("wandb", True), ("tensorboard", False), ("mlflow", False)):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, stub)
        if has_tables:
            monkeypatch.setattr(
                stub, "log_table", lambda self, *where, **what: told.append((where, what)), raising=False
            )
        else:
            monkeypatch.delattr(stub, "log_table", raising=False)
        with open_tracker(Config(tracker=name), tmp_path, 0) as opened:
            opened.log({"reward_mean": 1.0, "eval/reward": 0.5}, step=3)
            opened.log_samples([sample], step=3)
    numbers = ({"train/reward_mean": 1.0, "eval/reward": 0.5}, 3)
    table = {"columns": ["kind", "prompt", "completion", "reward"], "data": [["best", "2+2?", "4", 1.0]], "step": 3}
    text = '    {"kind": "best", "prompt": "2+2?", "completion": "4", "reward": 1.0}'
    assert told == [numbers, (("samples",), table), numbers, ({"samples": text}, 3), numbers]


def test_a_tracker_is_closed_when_training_fails(stub, tmp_path):
    with pytest.raises(ZeroDivisionError), open_tracker(Config(tracker="wandb"), tmp_path, 0):
        raise ZeroDivisionError
    assert stub.calls == ["init", "start", "finish"]


@pytest.mark.parametrize("call", ["init", "start"])
def test_a_tracker_that_does_not_start_is_a_mistake_in_one_sentence(stub, tmp_path, monkeypatch, call):
    monkeypatch.setattr(stub, "fails_in", call)
    words = rf"tracker wandb cannot be used \(no {call} today\); or use --tracker none"
    with pytest.raises(ConfigError, match=words), open_tracker(Config(tracker="wandb"), tmp_path, 0):
        pass


def test_one_that_nobody_asked_for_is_done_without(stub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stub, "fails_in", "start")
    with open_tracker(Config(tracker="auto"), tmp_path, 0) as opened:
        assert opened is None
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("call", ["log 1", "finish"])
def test_a_tracker_that_fails_later_is_left_alone_and_the_training_goes_on(stub, tmp_path, monkeypatch, capsys, call):
    monkeypatch.setattr(stub, "fails_in", call)
    options = {"tracker": "wandb", "steps": 2, "eval_every": 0}
    assert main(arguments(tmp_path / "run", **options)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert len(said) == 1 and f"tracker wandb has failed (no {call} today)" in said[0]
    assert stub.calls[-1] == call
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 2


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed
    for name in ("wandb", "tensorboard", "trackio"):
        (tmp_path / name / "run-1").mkdir(parents=True)
        monkeypatch.delitem(sys.modules, name, raising=False)
        words = f"tracker {name} is not installed; pip install {name}"
        with pytest.raises(ConfigError, match=words), open_tracker(Config(tracker=name), tmp_path, 0):
            pass
    with open_tracker(Config(tracker="auto"), tmp_path, 0) as opened:
        assert opened is None
