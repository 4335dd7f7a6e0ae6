"""What was written down for an earlier release goes on working under today's names."""

import re

import pytest
from places import ROOT

from rwkv_es.cli import main
from rwkv_es.config.file import load_file, run_folder
from rwkv_es.config.flags import parse, verb_parser
from rwkv_es.config.options import FIELDS, FORMER, build
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.task import load_task

FORMER_TASK = """
from rwkv_es.task import Problem
VERSION, STOP, MAX_NEW, TEMPLATE, ENDS = "1", (), 7, "raw", ("!",)
def problems(split, data=""): return [Problem("1", "1")]
def reward(problem, text): return 1.0
"""


def test_a_former_flag_means_todays_and_says_so(capsys):
    assert vars(parse(verb_parser("train"), ["--max-new", "8", "--steps=2"])) == {"max_new_tokens": "8", "steps": "2"}
    assert capsys.readouterr().err == "rwkv-es: note: --max-new is called --max-new-tokens now\n"
    assert vars(parse(verb_parser("train"), ["--max_new=8"])) == {"max_new_tokens": "8"}
    parse(verb_parser("train"), ["--max-new-tokens", "8"])
    assert capsys.readouterr().err.count("note") == 1, "for the second, none for the third"


def test_a_former_key_of_a_file_does_so_too_and_of_a_program(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("max_new: 8\nsteps: 2\n")
    assert load_file(str(file)) == {"max_new_tokens": 8, "steps": 2}
    assert capsys.readouterr().err == f"rwkv-es: note: max_new in {file} is called max_new_tokens now\n"
    assert build({"max_new": 8}).max_new_tokens == 8


def test_an_option_under_both_names_is_refused():
    with pytest.raises(ConfigError, match="max_new is the former name of max_new_tokens; give one of them"):
        build({"max_new": 8, "max_new_tokens": 8})


def test_the_folder_of_a_run_is_called_as_before():
    # sha256('{"max_new": 8}') begins with these digits: what the folder was called when the option had that name
    import hashlib

    digest = hashlib.sha256(b'{"max_new": 8}').hexdigest()[:6]
    assert run_folder(build({"max_new_tokens": 8})).name == f"countdown_mini-tiny-{digest}"


def test_a_run_that_was_begun_under_the_former_name_goes_on(tmp_path, capsys):
    options = [
        "--population",
        "4",
        "--prompts",
        "2",
        "--eval-every",
        "0",
        "--max-new-tokens",
        "5",
        "--reward-workers",
        "0",
        "--tracker",
        "none",
        "--schedule",
        "constant",
    ]
    assert main(["train", *options, "--steps", "1", "--run", str(tmp_path / "run")]) == 0
    file = tmp_path / "run" / "config.yaml"
    text = file.read_text()
    assert re.search(r"^max_new_tokens: 5$", text, flags=re.M)
    file.write_text(text.replace("max_new_tokens", "max_new"))
    assert main(["train", *options, "--steps", "2", "--run", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert main(["resume", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert "is called" not in capsys.readouterr().err, "nobody has written this"
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 3
    assert re.search(r"^max_new_tokens: 5$", file.read_text(), flags=re.M)


def test_a_task_with_former_constants_is_read(tmp_path):
    (tmp_path / "own.py").write_text(FORMER_TASK)
    task = load_task(str(tmp_path / "own.py"))
    assert (task.max_new_tokens, task.stop_included) == (7, ("!",))


def test_no_former_name_is_taken_again():
    assert not set(FORMER) & set(FIELDS)
    assert all(name in FIELDS for name in FORMER.values())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in FORMER if re.search(rf"--{name.replace('_', '-')}(?![\w-])", readme)]
