"""The README cannot drift: every command in it is one that the project understands, and its example task works."""

import os
import re
import shlex
import sys
import types

import pytest
from places import ROOT

from rwkv_es import cli
from rwkv_es.config.options import Config
from rwkv_es.pretrained.header import resolve

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def example_task(tmp_path, monkeypatch):
    """The README's own task, saved where its commands expect it."""
    (source,) = (block for block in blocks("python") if "def problems" in block)
    (tmp_path / "vowels.py").write_text(source, encoding="utf-8")
    (tmp_path / "rwkv_es").symlink_to(ROOT / "rwkv_es")
    for model in set(re.findall(r"--model (\S+\.pth)", README)):
        (tmp_path / model).symlink_to(resolve("tiny"))
    for name in ("gsm8k", "gsm8k-gentle"):  # runs, as far as the command line looks at them
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("task: gsm8k\nmade_with: {base: base.pth}")
        (run / "ledger.jsonl").touch()
        (run / "snapshots").mkdir()
        (run / "base.pth").symlink_to(resolve("tiny"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ran(monkeypatch):
    """Replace the verbs that need a model by ones that note what they are given."""
    seen = {}
    verbs = {"train": ["train"], "evaluate": ["evaluate", "generate"], "export": ["export"], "page": ["write_report"]}
    verbs.update(chat=["chat"], doctor=["doctor"])
    verbs["history"] = ["replay", "fork"]
    for module, names in verbs.items():
        wing = "measure" if module == "page" else "verbs"
        stub = types.ModuleType(f"rwkv_es.{wing}.{module}")
        for name in names:
            setattr(stub, name, lambda config, name=name: seen.update({name: config}))
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return seen


def test_there_are_commands_to_check():
    assert "./scripts/demo" in COMMANDS
    assert "./scripts/test" in COMMANDS
    assert sum(command.startswith("rwkv-es ") for command in COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, example_task, ran, capsys):
    program, *arguments = shlex.split(command)
    if program == "rwkv-es":
        assert cli.main(arguments) == 0, capsys.readouterr().err
        if arguments[0] in ("train", "eval", "generate", "export") and "--dry-run" not in arguments:
            name = {"eval": "evaluate"}.get(arguments[0], arguments[0])
            assert isinstance(ran[name], Config)
    elif program == "pip":
        assert arguments[0] == "install"
        extras = re.findall(r"\[(\w+)\]", arguments[1])
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    elif "accelerate" in (program, *arguments[:1]):
        launch_file = arguments[arguments.index("--config_file") + 1]
        assert (ROOT / launch_file).exists()
        assert cli.main([*arguments[arguments.index("rwkv_es") + 1 :], "--dry-run"]) == 0, capsys.readouterr().err
    else:
        assert program in ("./scripts/demo", "./scripts/test")
        assert os.access(ROOT / program, os.X_OK)


def test_the_example_task_is_short_and_pays_its_gold_answer_and_nothing_else(example_task):
    from rwkv_es.task import load_task

    (source,) = (block for block in blocks("python") if "def problems" in block)
    assert len(source.splitlines()) <= 16
    task = load_task("./vowels.py")
    for split in ("train", "test"):
        for problem in task.problems(split):
            assert task.reward(problem, f"It has {problem.answer}") == 1.0
            assert task.reward(problem, problem.answer + "0") == 0.0
            assert task.reward(problem, "") == 0.0
    assert [problem.answer for problem in task.problems("train")] == ["5", "2", "3", "2"]


def test_the_files_it_speaks_of_exist():
    for name in set(re.findall(r"`([A-Z]+\.(?:md|cff))`", README)):
        assert (ROOT / name).exists(), name


def test_the_example_in_python_is_the_file():
    assert f"```python\n{(ROOT / 'examples' / 'ask_tell.py').read_text(encoding='utf-8')}```" in README
