"""README and documentation cannot drift: every command is one that the project understands, and the example works."""

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
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
RUN_FOR_REAL = ("first-hour.md",)  # by test_docs.py


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    return [line for block in blocks("bash", text) for line in block.splitlines() if line.strip()]


COMMANDS = commands(README)
ALL_COMMANDS = [
    *COMMANDS,
    *(line for name, text in DOCS.items() if name not in RUN_FOR_REAL for line in commands(text)),
]


@pytest.fixture
def example_task(tmp_path, monkeypatch):
    """The README's own task, saved where its commands expect it."""
    (source,) = (block for block in blocks("python", DOCS["tasks.md"]) if "def problems" in block)
    (tmp_path / "vowels.py").write_text(source, encoding="utf-8")
    (tmp_path / "rwkv_es").symlink_to(ROOT / "rwkv_es")
    for model in set(re.findall(r"--model (\S+\.pth)", "\n".join([README, *DOCS.values()]))):
        (tmp_path / model).symlink_to(resolve("tiny"))
    for name in ("gsm8k", "gsm8k-gentle", "puzzles"):  # runs, as far as the command line looks at them
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("task: gsm8k\nmade_with: {base: base.pth}")
        (run / "ledger.jsonl").touch()
        (run / "snapshots").mkdir()
        (run / "base.pth").symlink_to(resolve("tiny"))
    for folder in ("gsm8k", "puzzles"):
        (tmp_path / folder).mkdir()
        rows = "".join(f'{{"question": "{i}+1?", "answer": "{i + 1}"}}\n' for i in range(16))
        (tmp_path / folder / "train.jsonl").write_text(rows)
        (tmp_path / folder / "test.jsonl").write_text(rows)
    (tmp_path / "rewards.py").write_text("def reward(completion, answer): return float(answer in completion)")
    (tmp_path / "trl_rewards.py").write_text("def accuracy(completions, answer, **columns): return [0.0] * len(answer)")
    monkeypatch.setattr(sys, "path", [*sys.path])  # a reward's folder comes into it
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ran(monkeypatch):
    """Replace the verbs that need a model by ones that note what they are given."""
    seen = {}
    verbs = {"train": ["train"], "evaluate": ["evaluate", "generate"], "export": ["export"], "page": ["write_report"]}
    verbs.update(chat=["chat"], doctor=["doctor"])
    verbs["history"] = ["replay", "fork", "apply"]
    for module, names in verbs.items():
        wing = "measure" if module == "page" else "verbs"
        stub = types.ModuleType(f"rwkv_es.{wing}.{module}")
        for name in names:
            setattr(stub, name, lambda config, *_, name=name: seen.update({name: config}))
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return seen


def test_there_are_commands_to_check():
    assert "./scripts/demo" in COMMANDS
    assert "./scripts/test" in COMMANDS
    assert sum(command.startswith("rwkv-es ") for command in COMMANDS) >= 8


@pytest.mark.parametrize("command", dict.fromkeys(ALL_COMMANDS))
def test_a_command_is_understood(command, example_task, ran, capsys):
    program, *arguments = shlex.split(command)
    if program == "rwkv-es":
        assert cli.main(arguments) == 0, capsys.readouterr().err
        if arguments[0] in ("train", "eval", "generate", "export") and "--dry-run" not in arguments:
            name = {"eval": "evaluate"}.get(arguments[0], arguments[0])
            assert isinstance(ran[name], Config)
    elif program == "pip":
        assert arguments[0] == "install"
        extras = [extra for found in re.findall(r"\[([\w,]+)\]", arguments[1]) for extra in found.split(",")]
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    elif "accelerate" in (program, *arguments[:1]):
        launch_file = arguments[arguments.index("--config_file") + 1]
        assert (ROOT / launch_file).exists()
        assert cli.main([*arguments[arguments.index("rwkv_es") + 1 :], "--dry-run"]) == 0, capsys.readouterr().err
    elif program == "python":
        text = (ROOT / arguments[0]).read_text()
        flags = [word.removeprefix("--") for word in arguments if word.startswith("--")]
        assert flags and all(f'add("{flag}"' in text or f'"--{flag}"' in text for flag in flags)
    else:
        assert program in ("./scripts/demo", "./scripts/test")
        assert os.access(ROOT / program, os.X_OK)


def test_the_example_task_is_short_and_pays_its_gold_answer_and_nothing_else(example_task):
    from rwkv_es.task import load_task

    (source,) = (block for block in blocks("python", DOCS["tasks.md"]) if "def problems" in block)
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
    code = (ROOT / "examples" / "ask_tell.py").read_text(encoding="utf-8")
    assert f'```python title="ask_tell.py"\n{code}```' in DOCS["python.md"]
