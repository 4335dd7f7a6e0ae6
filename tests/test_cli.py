"""The command line: options of a verb, one readable line for every mistake, help without torch."""

import os
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import yaml

from rwkv_es import __version__
from rwkv_es.cli import VERBS, main
from rwkv_es.config.options import OPTIONS, Config
from rwkv_es.system.errors import CheckpointError


@pytest.fixture
def ran(monkeypatch):
    """Replace the verbs by ones that note the config they are given."""
    seen = {}

    def note(name, config):
        seen[name] = config
        return Path("the-run")

    verbs = {"train": ["train"], "evaluate": ["evaluate", "generate"], "export": ["export"], "page": ["write_report"]}
    for module, names in verbs.items():
        wing = "measure" if module == "page" else "verbs"
        stub = types.ModuleType(f"rwkv_es.{wing}.{module}")
        for name in names:
            setattr(stub, name, partial(note, name))
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return seen


def complaint(capsys, argv):
    """Run a command line that must fail, and return its one line on stderr."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rwkv-es: ")
    assert err.count("\n") == 1
    return err


def test_flags_reach_the_verb_converted(ran):
    assert (
        main(
            [
                "train",
                "--model",
                "tiny",
                "--steps",
                "3",
                "--lr=1e-2",
                "--targets",
                "matrices=1,head.weight=10",
                "--sigma-decay",
                "--schedule=linear",
            ]
        )
        == 0
    )
    wanted = Config(
        steps=3, lr=0.01, targets={"matrices": 1.0, "head.weight": 10.0}, sigma_decay=True, schedule="linear"
    )
    assert ran["train"] == wanted


def test_training_leaves_the_best_weights_exported_and_a_report(ran):
    assert main(["train", "--model", "tiny", "--steps", "3"]) == 0
    assert ran == {"train": Config(steps=3), "export": Config(run="the-run"), "write_report": Path("the-run")}
    ran.clear()
    assert main(["train", "--steps", "0"]) == 0
    assert "export" not in ran


@pytest.mark.parametrize(("task", "recipe"), [("countdown_mini", "tiny"), ("arithmetic_mini", "arithmetic")])
def test_without_a_model_the_embedded_one_is_trained_by_its_recipe(ran, capsys, task, recipe):
    flags = ["--task", task] if task != "countdown_mini" else []
    assert main(["train", *flags, "--steps", "7", "--run", "r"]) == 0
    assert f"--config {recipe}" in capsys.readouterr().err
    taken = ran["train"]
    assert main(["train", "--config", recipe, "--steps", "7", "--run", "r"]) == 0
    assert ran["train"] == taken and taken.steps == 7 and taken.task == task and set(taken.targets) != {"matrices"}


def test_a_files_spelling_of_a_flag_is_understood_but_values_are_left_alone(ran):
    assert main(["train", "--eval_every", "3", "--run=a_b", "--task", "c_d"]) == 0
    assert ran["train"] == Config(eval_every=3, run="a_b", task="c_d")
    assert main(["generate", "--", "--what_is_this"]) == 0
    assert ran["generate"].prompt == "--what_is_this"


def test_flags_win_over_the_file(ran, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 5\nlr: 0.5\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--steps", "7"]) == 0
    assert ran["train"] == Config(steps=7, lr=0.5)


@pytest.mark.parametrize(
    ("argv", "name", "field"),
    [
        (["eval", "m.pth", "--eval-size", "3"], "evaluate", "model"),
        (["eval", "--model", "m.pth"], "evaluate", "model"),
        (["generate", "m.pth"], "generate", "prompt"),
        (["export", "--weights", "last", "m.pth"], "export", "run"),
    ],
)
def test_the_main_thing_needs_no_flag(ran, argv, name, field):
    assert main(argv) == 0
    assert getattr(ran[name], field) == "m.pth"


@pytest.mark.parametrize("number", ["-1e39", "-1E+2", "-2", "-.5"])
@pytest.mark.parametrize("verb", ["train", "eval", "generate"])
def test_negative_numbers_are_values_in_every_spelling(ran, verb, number):
    words = ["--prompt", "-x"] if verb == "generate" else []
    assert main([verb, "--presence-penalty", number, *words]) == 0
    config = ran[{"eval": "evaluate"}.get(verb, verb)]
    assert config.presence_penalty == float(number) and config.prompt == ("-x" if words else "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["train", "--populaton", "8"], "unknown option --populaton for train; did you mean --population?"),
        (["train", "--populaton=8"], "did you mean --population?"),
        (["train", "--step", "8"], "unknown option --step for train; did you mean --steps?"),
        (["train", "8"], "unexpected '8'; see"),
        (
            ["generate", "-5e1"],
            "unexpected '-5e1'; options have two dashes, and a text that begins with one stands behind --",
        ),
        (["train", "--steps"], "--steps needs a value"),
        (
            ["train", "--system", "--what"],
            "(one that begins with -- is written --system=--...); see rwkv-es train --help",
        ),
        (["train", "--lr", "-1e-3"], "lr must be above 0; got -0.001"),
        (["eval", "--presence-penalty", "-inf"], "presence_penalty must be a finite number; got -inf"),
        (
            ["train", "--run", "r", "--max-new", "4", "--max-new-tokens=4"],
            "--max-new is the former name of --max-new-tokens",
        ),
        (["train", "--steps", "x"], "steps must be a whole number; got 'x'"),
        (["train", "--population", "7"], "try 8"),
        (["train", "--config", "none.yaml"], "none.yaml cannot be read"),
        (["eval", "--sigma", "1"], "unknown option --sigma for eval"),
        (["eval", "a.pth", "--model", "b.pth"], "model is given twice: 'a.pth' and 'b.pth'"),
        (["generate"], "generate needs a prompt: rwkv-es generate PROMPT"),
        (["export"], "export needs a run: rwkv-es export RUN"),
        (["tasks", "shwo", "copy"], "invalid choice: 'shwo'"),
        (["tasks", "show"], "tasks show needs a task"),
    ],
)
def test_a_mistake_is_one_readable_line(ran, capsys, argv, words):
    assert words in complaint(capsys, argv)
    assert ran == {}


def test_a_user_error_of_a_verb_is_one_line_even_if_its_text_has_several(ran, capsys, monkeypatch):
    def fail(config):
        raise CheckpointError("the file is\n  broken")

    monkeypatch.setattr(sys.modules["rwkv_es.verbs.train"], "train", fail)
    assert complaint(capsys, ["train", "--model", "tiny"]) == "rwkv-es: the file is broken\n"


@pytest.mark.parametrize("argv", [["--run", "r"], ["--run=r", "--role", "x"]])
def test_torchrun_leaves_our_options_alone_behind_two_dashes(argv):
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(["--nproc_per_node", "2", "-m", "rwkv_es", "--", "train", *argv])
    assert parsed.module and parsed.training_script == "rwkv_es"
    assert parsed.training_script_args == ["train", *argv]


def test_what_a_message_repeats_is_no_terminal_command(capsys):
    said = complaint(capsys, ["train", "--config", "\x1b[2J\x9bm.yaml"])
    assert "[2J" in said and said.removesuffix("\n").isprintable()


def test_an_interrupted_training_says_how_to_go_on(ran, capsys, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["rwkv_es.verbs.train"], "train", interrupt)
    assert main(["train"]) == 130
    assert "continues after the last finished step" in capsys.readouterr().err


def test_a_bug_shows_its_traceback(ran, monkeypatch):
    def fail(config):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["rwkv_es.verbs.train"], "train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_a_dry_run_prints_a_config_that_can_be_given_again_and_does_nothing(ran, capsys, tmp_path):
    assert main(["train", "--steps", "3", "--targets", "vectors=2", "--dry-run"]) == 0
    assert ran == {}
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["run"].startswith("runs/countdown_mini-tiny-")
    (tmp_path / "again.yaml").write_text(text)
    main(["train", "--config", str(tmp_path / "again.yaml"), "--dry-run"])
    again = capsys.readouterr().out
    assert yaml.safe_load(again) == yaml.safe_load(text)
    assert [line for line in text.splitlines() if line.startswith("#")]  # the plan: memory that is free now, and more


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--shots", "none.txt"], "none.txt cannot be read"),
        (["--template", "chatty"], "unknown template 'chatty'"),
        (["--template", "system"], "needs a text: --system TEXT"),
        (["--data", "x"], "takes its problems from a table and no data; got 'x'"),
        (["--task", "guess_mini", "--data", "x"], "hides its own numbers and takes no data; got 'x'"),
        (["--task", "text", "--data", "none.txt"], "none.txt cannot be read"),
        (["--task", "text", "--data", __file__, "--prompts", "9999"], "training problems; try --prompts"),
    ],
)
def test_a_dry_run_looks_at_what_prompts_are_made_of(ran, capsys, argv, words):
    assert main(["train", *argv, "--dry-run"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", OPTIONS)
def test_help_lists_every_option_of_the_verb(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in OPTIONS[verb]:
        assert f"--{name.replace('_', '-')} " in text or f"[--{name.replace('_', '-')}" in text


def test_help_shows_defaults_and_choices(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("(default: 256)", "--optimizer sgd|momentum|adam", "(default: matrices=1)", "(default: false)"):
        assert words in text


def test_the_overview_names_every_command(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == text
    assert all(f"\n  {verb} " in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rwkv-es {__version__}\n"


def test_help_imports_neither_torch_nor_numpy():
    code = "import sys, rwkv_es.cli as c; c.main(['train', '--dry-run']); sys.exit(sorted({'torch', 'numpy'} & {*sys.modules}) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env={**os.environ})


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "rwkv_es", "trian"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "rwkv-es: there is no command 'trian'; did you mean train?\n"


def test_tasks_are_listed(capsys):
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "copy             Copy: repeat four digits. The smallest task, for first runs and for tests; needs no data."
        in lines
    )


def test_a_task_is_shown_as_it_is_sent(capsys):
    assert main(["tasks", "show", "copy"]) == 0
    shown = "6 3 0 7:\n--- ends before '\\n', at token 0; at most 12 tokens\n--- scored is what follows; the right answer (scores 1.0):\n6 3 0 7\n"
    assert capsys.readouterr().out == shown.replace("6 3 0 7", "7 9 8 0")
    assert main(["tasks", "show", "copy", "--template", "think", "--system", "Be brief.", "--bos", "--shots", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "<token 0>System: Be brief.\n\nUser: 6 3 0 7:\n\nAssistant: 6 3 0 7\n\nUser: 7 9 8 0:\n\nAssistant: <think\n---"
    )
    assert "scored is ' <think' and what follows" in out


def test_every_part_of_a_mixture_is_shown_and_another_reward_is_named(capsys):
    assert main(["tasks", "show", "copy=1,countdown_mini=2", "--reward", "builtin:length:10"]) == 0
    out = capsys.readouterr().out
    assert out.count("--- ends") == 2 and out.count("scores -") == 2 and "<answer>" in out


def test_a_task_is_shown_without_training_problems_and_with_a_reward_that_fails(capsys, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    (tmp_path / "fails.py").write_text("def reward(completion, answer): raise KeyError(answer)")
    assert main(["tasks", "show", "jsonl", "--data", str(tmp_path), "--reward", f"{tmp_path}/fails.py:reward"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("User: 1 + 1?\n\nAssistant:\n---") and "(fails: KeyError: '2'):" in out
