"""The options: one list, strict names and values, flags and files alike."""

import math
from dataclasses import fields
from hashlib import sha256

import pytest
import yaml

from rwkv_es.config.file import load_file, run_folder
from rwkv_es.config.options import OPTIONS, Config, build, model_name, to_dict
from rwkv_es.system.errors import ConfigError


def test_defaults_are_valid_and_survive_a_round_trip_through_yaml():
    config = Config()
    assert build(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_every_option_has_a_help_text_and_a_verb_that_uses_it():
    used = {name for names in OPTIONS.values() for name in names}
    assert used == {f.name for f in fields(Config)}
    assert all(f.metadata["help"] for f in fields(Config))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", 12.0, 12),
        ("sigma", "1e-2", 0.01),
        ("lr", 1, 1.0),
        ("sigma_decay", "yes", True),
        ("sigma_decay", False, False),
        ("model", "a.pth", "a.pth"),
        ("targets", "matrices=1, head.weight=10", {"matrices": 1.0, "head.weight": 10.0}),
        ("targets", {"vectors": 2}, {"vectors": 2.0}),
    ],
)
def test_strings_and_parsed_values_become_the_fields_type(name, text, value):
    made = getattr(build({name: text}), name)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"population": 7}, "population must be even (members come in mirrored pairs); got 7, try 8"),
        ({"population": 0}, "population must be at least 1; got 0"),
        ({"steps": -1}, "steps must not be negative; got -1"),
        ({"sigma": 0}, "sigma must be above 0; got 0.0"),
        ({"sigma": "nan"}, "sigma must be above 0; got nan"),
        ({"lr": math.inf}, "lr must be a finite number; got inf"),
        ({"top_p": 1.5}, "top_p must lie in (0, 1]; got 1.5"),
        ({"schedule_end": 0}, "schedule_end must lie in (0, 1]"),
        ({"momentum": 1}, "momentum must be below 1"),
        ({"objective": "pass"}, "objective pass compares samples, and there is one; try samples 4"),
        ({"reward_signature": "sbl"}, "reward_signature must be one of auto, task, plain, trl, trl_messages, verl"),
        ({"fitness": "best"}, "fitness must be one of zscore, centered, rank, sign, raw; got 'best'"),
        ({"targets": {}}, "targets is empty"),
        ({"targets": "head.weight=-1"}, "multiplier of target 'head.weight' must be a number above 0; got -1.0"),
        ({"targets": "head.weight=nan"}, "must be a number above 0; got nan"),
        ({"targets": "head.weight"}, "targets must be name=multiplier"),
        ({"targets": "a=1,a=2"}, "targets must be name=multiplier,name=multiplier with each name once"),
        ({"targets": "=1"}, "targets must be name=multiplier,name=multiplier with each name once; got '=1'"),
        ({"targets": 3}, "targets must be name=multiplier"),
        ({"steps": "ten"}, "steps must be a whole number; got 'ten'"),
        ({"steps": 1.5}, "steps must be a whole number; got 1.5"),
        ({"steps": True}, "steps must be a whole number; got True"),
        ({"lr": True}, "lr must be a number; got True"),
        ({"lr": 10**400}, "lr must be a number"),
        ({"sigma_decay": "maybe"}, "sigma_decay must be true or false; got 'maybe'"),
        ({"model": 3}, "model must be text; got 3"),
        ({"population_size": 8}, "unknown option 'population_size' for train; did you mean population?"),
        ({1: 2}, "unknown option 1 for train"),
    ],
)
def test_bad_values_are_refused_in_a_readable_sentence(values, words):
    with pytest.raises(ConfigError) as error:
        build(values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_of_another_verb_is_unknown():
    with pytest.raises(ConfigError, match="unknown option 'sigma' for eval"):
        build({"sigma": 1}, "eval")


def test_files_are_read_by_their_ending(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\nlr: 1e-2\n")
    (tmp_path / "a.toml").write_text('steps = 3\nlr = 1e-2\n[targets]\n"head.weight" = 10\n')
    (tmp_path / "empty.yml").write_text("# nothing\n")
    assert build(load_file(str(tmp_path / "a.yaml"))) == Config(steps=3, lr=0.01)
    assert build(load_file(str(tmp_path / "a.toml"))) == Config(steps=3, lr=0.01, targets={"head.weight": 10.0})
    assert load_file(str(tmp_path / "empty.yml")) == {}


def test_a_run_folders_config_can_be_given_again(tmp_path):
    (tmp_path / "config.yaml").write_text("steps: 3\nmade_with:\n  torch: 2.13.0\n")
    assert load_file(str(tmp_path / "config.yaml")) == {"steps": 3}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", b"steps: [1", "cannot be parsed"),
        ("a.toml", b"steps = ", "cannot be parsed"),
        ("a.yaml", b"- 1\n- 2", "must hold a mapping of options to values; got list"),
        ("a.yaml", b"false", "must hold a mapping of options to values; got bool"),
        ("a.yaml", b"\xff\xfe", "is UTF-16; save it as UTF-8"),
        ("a.json", b"{}", "must end in .yaml, .yml, .toml"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_file(str(tmp_path / name))
    assert words in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_file(str(tmp_path / "none.yaml"))


def digest(text):
    return sha256(text.encode()).hexdigest()[:6]


def test_the_run_folder_is_named_after_task_model_and_what_differs_from_the_defaults():
    official = "/models/rwkv7-g1j-1.5b-20260831-ctx16384"
    for model in (official, official + ".pth", official + ".safetensors"):
        assert model_name(model) == "rwkv7-g1j-1.5b-20260831-ctx16384"
    config = Config(task="my/own_task.py", model=official, seed=3)
    expected = "runs/own_task-rwkv7-g1j-1.5b-20260831-ctx16384-" + digest('{"seed": 3}')
    assert str(run_folder(config)) == expected
    assert str(run_folder(Config())) == "runs/countdown_mini-tiny"
    assert str(run_folder(Config(steps=7, eval_every=3, threads=1))) == "runs/countdown_mini-tiny", (
        "the weights are the same"
    )
    assert str(run_folder(Config(lr=0.5))) == "runs/countdown_mini-tiny-" + digest('{"lr": 0.5}')
    assert str(run_folder(Config(run="here"))) == "here"
    assert str(run_folder(Config(task="svamp=1,./mine/own.py=2,countdown:5"))) == "runs/svamp+own+countdown-5-tiny"


def test_a_folder_that_an_earlier_release_named_after_the_seed_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "runs" / "countdown_mini-tiny-seed3"
    old.mkdir(parents=True)
    (old / "config.yaml").write_text("seed: 3\nlr: 0.5\nmade_with: {}\n")
    (old / "ledger.jsonl").touch()
    assert str(run_folder(Config(seed=3, lr=0.5))) == "runs/countdown_mini-tiny-seed3"
    assert run_folder(Config(seed=3, lr=0.25)).name == "countdown_mini-tiny-" + digest('{"lr": 0.25, "seed": 3}')


def test_the_run_of_the_same_options_is_found_under_any_name_that_an_earlier_release_made_of_them(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, text in {"a0b1c2": "lr: 0.5\nsteps: 3\n", "0": "lr: [", "1": "lr: 0.75\n", "2": ""}.items():
        old = tmp_path / "runs" / f"countdown_mini-tiny-{name}"
        old.mkdir(parents=True)
        (old / "config.yaml").write_text(text)
        (old / "ledger.jsonl").touch()
    assert run_folder(Config(lr=0.5)).name == "countdown_mini-tiny-a0b1c2"
    assert run_folder(Config(lr=0.5, seed=1)).name == "countdown_mini-tiny-" + digest('{"lr": 0.5, "seed": 1}')
    assert run_folder(Config()).name == "countdown_mini-tiny-2"


def test_the_name_of_a_long_mixture_is_cut_and_still_its_own():
    first, second = (",".join(f"./{'täsk' * 8}{i}.py={w}" for i in range(20)) for w in (1, 2))
    names = [run_folder(Config(task=task)).name for task in (first, second.replace("19.py", "20.py"))]
    assert all(len(name.encode()) < 200 for name in names) and len(set(names)) == 2
    assert names[0].startswith("täsktäsk") and run_folder(Config(task=first)).name == names[0]


@pytest.mark.parametrize(
    "name, value, most",
    [
        ("threads", 5000, 4096),
        ("reward_workers", 5000, 4096),
        ("keep", 10**20, 2**62),
        ("samples", 4097, 4096),
        ("max_new_tokens", 2**20 + 1, 2**20),
    ],
)
def test_numbers_that_nothing_can_count_are_refused(name, value, most):
    with pytest.raises(ConfigError, match=f"{name} must be at most {most}; got {value}"):
        build({name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"population": 10**12},
        {"prompts": 10**12},
        {"samples": 10**12},
        {"slots": 10**12},
        {"population": 1 << 16, "prompts": 1 << 12, "samples": 4, "temperature": 1},
    ],
    ids=str,
)
def test_counts_that_no_step_can_have_are_refused(values):
    with pytest.raises(ConfigError, match="at most"):
        build(values)
