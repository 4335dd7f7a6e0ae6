"""Options that do nothing beside others are refused where somebody has written them, and said elsewhere."""

import pytest

from rwkv_es.cli import main
from rwkv_es.config.combinations import idle_here, idle_options
from rwkv_es.config.options import Config, build

IDLE = [
    ("train", {"samples": 4}, "samples 4 does nothing if all answers are greedy"),
    ("doctor", {"samples": 4}, "samples 4"),
    ("generate", {"samples": 4}, "samples 4"),
    ("eval", {"samples": 4}, "samples 4"),
    ("eval", {"samples": 4, "temperature": 1, "top_k": 1}, "samples 4"),
    ("train", {"top_p": 0.9}, "top_p 0.9 does nothing at temperature 0"),
    ("chat", {"top_k": 40}, "top_k 40 does nothing at temperature 0"),
    ("generate", {"temperature": 1, "top_k": 1}, "temperature 1.0 does nothing with top_k 1"),
    ("eval", {"temperature": 1, "top_k": 1, "top_p": 0.5}, "top_p 0.5 does nothing with top_k 1"),
    ("eval", {"seed": 3}, "seed 3"),
    ("chat", {"seed": 3}, "seed 3"),
    ("train", {"momentum": 0.5}, "momentum 0.5 does nothing with optimizer sgd"),
    ("train", {"sigma_decay": True}, "sigma_decay True"),
    ("train", {"sigma_decay": True, "schedule": "linear", "schedule_end": 1}, "sigma_decay True"),
    ("train", {"schedule_end": 0.5}, "schedule_end 0.5 does nothing with schedule constant"),
    ("train", {"schedule": "cosine", "schedule_end": 1}, "schedule cosine does nothing with schedule_end 1"),
    ("train", {"master": "stochastic", "dtype": "fp32"}, "master stochastic"),
    ("train", {"targets": "vectors=1", "rank": 4}, "rank 4"),
    ("doctor", {"targets": "vectors=1", "rank": 4}, "rank 4"),
    ("train", {"patience": 3, "eval_every": 0}, "patience 3 does nothing without held-out evaluations"),
    ("train", {"patience": 3, "eval_every": 10, "steps": 30}, "patience 3 does nothing before the last step"),
    ("train", {"eval_size": 50, "eval_every": 0}, "eval_size 50"),
    ("train", {"reward_signature": "trl"}, "reward_signature trl"),
    ("eval", {"reward_signature": "trl", "reward": "builtin:format=1,builtin:length:9"}, "reward_signature trl"),
    ("train", {"reward_timeout": 9, "reward_workers": 0}, "reward_timeout 9.0"),
    ("eval", {"base": "tiny"}, "base tiny"),
    ("eval", {"text": "a.txt", "task": "copy"}, "task copy does nothing with --text"),
    ("eval", {"objective": "pass", "samples": 4, "temperature": 1}, "objective pass does nothing in eval, unless it"),
    ("eval", {"objective": "logprob", "out": "b.jsonl"}, "out b.jsonl does nothing with objective logprob alone"),
    ("eval", {"objective": "logprob", "temperature": 1}, "temperature 1.0 does nothing with objective logprob alone"),
    ("eval", {"text": "a.txt", "objective": "logprob"}, "objective logprob does nothing with --text"),
    ("eval", {"text": "a.txt", "temperature": 1}, "temperature 1.0 does nothing with --text"),
    ("eval", {"text": "a.txt", "bos": True}, "bos True does nothing with --text"),
    ("eval", {"text": "a.txt", "out": "b.jsonl"}, "out b.jsonl does nothing with --text"),
]


@pytest.mark.parametrize("verb, options, words", IDLE)
def test_what_does_nothing_is_found(verb, options, words):
    found = [idle.text for idle in idle_options(build(options, verb), verb)]
    assert [text.startswith(words) for text in found].count(True) == 1


@pytest.mark.parametrize(
    "verb, options",
    [
        ("train", {}),
        ("eval", {}),
        ("chat", {}),
        ("train", {"samples": 4, "temperature": 1, "top_p": 0.9, "top_k": 5, "seed": 3}),
        ("train", {"seed": 3}),  # of the noise
        ("doctor", {"seed": 3}),
        ("train", {"optimizer": "adam", "momentum": 0.5}),
        ("train", {"schedule": "linear", "sigma_decay": True, "schedule_end": 0.5}),
        ("train", {"master": "stochastic"}),
        ("train", {"targets": "vectors=1,matrices=1", "rank": 4}),
        ("train", {"patience": 2, "eval_every": 10, "steps": 30}),
        ("train", {"reward": "own.py:f=1,builtin:format=1", "reward_signature": "trl"}),
        ("eval", {"text": "a.txt", "base": "b.pth", "slots": 8, "quantize": "int8", "state": "s.pth"}),
        ("eval", {"objective": "outcome=1,logprob=1", "samples": 4, "temperature": 1, "out": "b.jsonl"}),
        ("export", {"run": "r", "weights": "last"}),
        ("fork", {"run": "r", "step": 3, "out": "b"}),
    ],
)
def test_what_does_something_is_not(verb, options):
    assert list(idle_options(build(options, verb), verb)) == []


def test_an_option_that_is_named_is_meant_at_its_default_too():
    assert list(idle_options(Config(), "train", {"lr"})) == []
    (idle,) = idle_options(Config(), "train", {"momentum"})
    assert idle.name == "momentum"


def test_what_does_nothing_here_is_said():
    config = Config(rank_timeout=5, checksum_every=2, master="stochastic")
    assert [idle.name for idle in idle_here(config, 1, "bfloat16")] == ["rank_timeout", "checksum_every"]
    assert [idle.name for idle in idle_here(config, 2, "float32")] == ["master"]
    assert list(idle_here(Config(), 1, "float32")) == []


def dry(*argv):
    return main(["train", *argv, "--dry-run"])


def test_flags_and_files_of_a_new_run_are_refused_and_those_of_a_run_that_has_begun_are_said(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert dry("--patience", "3", "--eval-every", "0") == 2
    assert "patience 3 does nothing" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("sigma_decay: true\n")
    assert dry("--config", "mine.yaml") == 2
    assert "sigma_decay True does nothing" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ledger.jsonl").write_text("")
    (tmp_path / "run" / "config.yaml").write_text("sigma_decay: true\n")
    assert dry("--config", "run/config.yaml") == 0
    assert "note: sigma_decay True does nothing" in capsys.readouterr().err
    assert dry("--config", "run", "--momentum", "0.9") == 2


def test_a_list_of_tasks_takes_no_options(capsys):
    assert main(["tasks", "--template", "chat"]) == 2
    assert "template does nothing in a list of all tasks" in capsys.readouterr().err
