"""How processes find each other: the launcher's environment variables, and starts without end."""

import signal

import pytest
from torch import distributed

from rwkv_es.run import joining, launcher
from rwkv_es.run.joining import num_processes
from rwkv_es.system.errors import ConfigError, Terminated


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number from 1 on; got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number from 1 on; got '0'"),
        ({"WORLD_SIZE": "2"}, "RANK must be a whole number from 0 on; it is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be below WORLD_SIZE, which is 2; got 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number from 0 on"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "x"}, "MASTER_PORT must be a whole number"),
    ],
)
def test_odd_environment_variables_are_one_line(monkeypatch, variables, words):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        num_processes()
    assert words in str(error.value)


def test_an_empty_or_missing_world_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert num_processes() == 1
    monkeypatch.setenv("WORLD_SIZE", "")
    assert num_processes() == 1


def test_starts_that_bring_no_step_come_to_an_end(monkeypatch):
    launchers = distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(launchers.port))
    monkeypatch.setattr(joining, "has_store", lambda: True)

    def start(number, num_steps):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        joining.refuse_endless_starts(num_steps)

    for number, num_steps in [(0, 0), (9, 0), (10, 3), (19, 3), (25, 4)]:
        start(number, num_steps)
    with pytest.raises(ConfigError, match="10 starts in a row have ended before step 5 was taken"):
        start(35, 4)


class Told:
    """A cluster in which another process speaks of a mistake."""

    def has_mistake(self):
        return True

    def speaks_of_mistake(self):
        return False


@pytest.mark.parametrize("error, waits", [(Terminated(), 0), (ConfigError("mine"), 1), (SystemExit(2), 1)])
def test_who_was_asked_to_end_waits_for_nobody_and_says_nothing(monkeypatch, error, waits):
    slept = []
    monkeypatch.setattr(launcher, "launcher_pid", lambda: 1)
    monkeypatch.setattr(launcher.time, "sleep", slept.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        said = joining._settled(Told(), error)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(said, SystemExit) and said.code == 2
    assert len(slept) == waits
