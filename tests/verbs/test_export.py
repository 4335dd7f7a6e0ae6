"""What leaves a run: exactly the base's layout, and nothing written over."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch
from layered import layers
from small_runs import run as train_small

from rwkv_es.config.options import Config, build, to_dict
from rwkv_es.es.strategy import Step
from rwkv_es.es.update import checksum
from rwkv_es.pretrained.checkpoint import load, resolve
from rwkv_es.reward.adapters import scorer_of
from rwkv_es.run.ledger import Ledger, default_export
from rwkv_es.system.errors import CheckpointError, ConfigError
from rwkv_es.verbs.export import export, export_params
from rwkv_es.verbs.train import train

NAME = "rwkv7-g1j-0.1b-20260831-ctx4096.pth"


@pytest.fixture
def run(tmp_path):
    """A run of two steps from a bf16 base whose keys are in an order of their own; step 1 is the best."""
    base = tmp_path / "models" / NAME
    base.parent.mkdir()
    torch.save({name: tensor.bfloat16() for name, tensor in reversed(layers(1.0).items())}, base)
    with Ledger.open(tmp_path / "run", to_dict(Config()), base) as ledger:
        for number in (1, 2):
            weights = layers(number + 2**-12)
            ledger.append(Step(number - 1, [[1.0]], [0.0], 0.1, 0.1, 1, 0.1, checksum(weights)))
            ledger.save_snapshot(number, weights, {}, 0.5 if number == 1 else None)
    return tmp_path / "run"


def read(path):
    return torch.load(path, weights_only=True)


def value(path):
    (found,) = {tensor.unique().item() for tensor in read(path).values()}
    return found


def test_the_file_has_the_bases_keys_order_shapes_dtypes_and_name(run):
    out = export(Config(run=str(run)))
    assert out == run / NAME
    base = read(run.parent / "models" / NAME)
    assert list(read(out)) == list(base)
    for name, tensor in read(out).items():
        assert (tensor.shape, tensor.dtype) == (base[name].shape, torch.bfloat16), name
        assert tensor.is_contiguous()


def test_best_and_last_weights_are_chosen(run, tmp_path):
    assert value(export(Config(run=str(run)))) == 1.0  # 1 + 2**-12 in bf16
    assert value(export(Config(run=str(run), weights="last", out=str(tmp_path / "new" / "a.pth")))) == 2.0


@pytest.mark.parametrize(("before", "step"), [(0.5, 0), (0.4, 1)])
def test_weights_that_are_no_better_than_the_base_are_not_the_best(run, capsys, before, step):
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/reward": before}) + "\n")
    out = export(Config(run=str(run)))
    said = capsys.readouterr()
    assert f"(weights after {step} steps)" in said.out
    assert ("better than the model before training (reward 0.500)" in said.err) == (step == 0)
    assert all(torch.equal(tensor, read(run.parent / "models" / NAME)[name]) for name, tensor in read(out).items())


def test_a_base_that_is_the_best_and_gone_is_said(run):
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/reward": 0.6}) + "\n")
    (run.parent / "models" / NAME).write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"best weights are those of the base .* it is not there"):
        export(Config(run=str(run)))


def test_without_an_evaluation_the_last_weights_are_exported_and_it_is_said(run, capsys):
    (run / "snapshots" / "best.json").unlink()
    assert value(export(Config(run=str(run)))) == 2.0
    assert "no held-out evaluation" in capsys.readouterr().err


def test_the_default_file_may_be_exported_again_but_no_other_is_written_over(run, tmp_path):
    export(Config(run=str(run)))
    assert value(export(Config(run=str(run), weights="last"))) == 2.0
    other = tmp_path / "other.pth"
    other.write_text("mine")
    with pytest.raises(ConfigError, match=r"other\.pth exists already"):
        export(Config(run=str(run), out=str(other)))
    assert other.read_text() == "mine"


def test_the_base_is_never_written_over(run, tmp_path):
    base = tmp_path / "models" / NAME
    before = base.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        export(Config(run=str(run), out=str(base)))
    with pytest.raises(ConfigError, match="is the base checkpoint"):
        export_params(layers(), base, tmp_path / "run" / ".." / "models" / NAME)
    assert base.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "export needs the folder of a run"),
        ({"run": "none"}, "holds no run"),
        ({"out": "a.bin"}, r"must end in \.pth or \.safetensors; got 'a\.bin'"),
    ],
)
def test_what_cannot_be_exported_is_said(run, options, words):
    values = {"run": "" if not options else str(run), **options}
    with pytest.raises(ConfigError, match=words):
        export(Config(**values))


def test_a_run_without_a_snapshot_is_said(tmp_path):
    base = tmp_path / "base.pth"
    torch.save(layers(), base)
    Ledger.open(tmp_path / "run", to_dict(Config()), base).close()
    with pytest.raises(ConfigError, match="has no readable snapshot yet"):
        export(Config(run=str(tmp_path / "run")))


def test_weights_that_do_not_fit_the_base_are_refused(run, tmp_path):
    base, out = tmp_path / "models" / NAME, tmp_path / "out.pth"
    wrong = layers()
    del wrong["head.weight"]
    with pytest.raises(CheckpointError, match=r"differ in the tensors head\.weight"):
        export_params(wrong, base, out)
    with pytest.raises(CheckpointError, match=r"differ in the tensors extra"):
        export_params({**layers(), "extra": torch.zeros(1)}, base, out)
    with pytest.raises(CheckpointError, match=r"emb\.weight is \(16, 64\) in the run, but \(8, 64\) in the base"):
        export_params({**layers(), "emb.weight": torch.zeros(16, 64)}, base, out)
    with pytest.raises(CheckpointError, match=r"emb\.weight is not finite"):
        export_params({**layers(), "emb.weight": torch.full((8, 64), torch.nan)}, base, out)
    assert not out.exists()


def test_an_initial_state_goes_to_a_file_of_its_own_in_fp32(run, tmp_path):
    state = {"blocks.0.att.time_state": torch.rand(1, 64, 64, dtype=torch.float64)}
    out = tmp_path / "out.pth"
    written = export_params({**layers(), **state}, tmp_path / "models" / NAME, out)
    assert written == [out, tmp_path / "out-state.pth"]
    assert set(read(out)) == set(layers())
    saved = read(tmp_path / "out-state.pth")
    assert saved["blocks.0.att.time_state"].dtype == torch.float32
    torch.testing.assert_close(saved["blocks.0.att.time_state"], state["blocks.0.att.time_state"].float())
    assert list(saved) == list(state)


@pytest.mark.parametrize("name", ["tokenizer.json", NAME.replace(".pth", ".tokenizer.json")])
def test_a_tokenizer_beside_the_base_comes_along(run, tmp_path, name):
    (tmp_path / "models" / name).write_text(json.dumps({"vocab": 8}))
    written = export_params(layers(), tmp_path / "models" / NAME, tmp_path / "out.pth")
    assert written == [tmp_path / "out.pth", tmp_path / "out.tokenizer.json"]
    assert json.loads(written[1].read_text()) == {"vocab": 8}


def test_of_two_tokenizers_beside_the_base_its_own_comes_along(run, tmp_path):
    (tmp_path / "models" / "tokenizer.json").write_text("of another model")
    (tmp_path / "models" / NAME.replace(".pth", ".tokenizer.json")).write_text("its own")
    export_params(layers(), tmp_path / "models" / NAME, tmp_path / "out.pth")
    assert (tmp_path / "out.tokenizer.json").read_text() == "its own"


def test_a_base_whose_embedding_is_its_head_is_exported_to_safetensors(tmp_path):
    base, out = tmp_path / "base.pth", tmp_path / "out.safetensors"
    torch.save({**layers(), "head.weight": layers()["emb.weight"]}, base)
    tied = load(base)[0]
    tied["head.weight"] = tied["emb.weight"]
    export_params(tied, base, out)
    assert all(torch.equal(tensor, tied[name]) for name, tensor in load(out)[0].items())


def test_without_its_base_a_run_is_exported_as_trained(run, tmp_path, capsys):
    (tmp_path / "models" / NAME).unlink()
    out = export(Config(run=str(run)))
    assert value(out) == 1 + 2**-12
    assert "is gone" in capsys.readouterr().err


def test_the_default_name_keeps_the_dots_of_an_official_name():
    assert default_export(Path("runs/a"), Path("/m") / NAME) == Path("runs/a") / NAME


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"master": "stochastic"}, {"quantize": "int8"}, {"dtype": "fp32"}], ids=str)
def test_what_was_no_target_leaves_with_the_bases_bits_in_any_dtype(tmp_path, stored, options):
    base = tmp_path / "base.pth"
    params, _ = load(resolve("tiny"))
    exact = {name: (tensor * (1 + 2**-9)).to(stored) for name, tensor in params.items()}  # no numbers of bf16
    torch.save(exact, base)
    target = "blocks.0.att.key.weight"
    small = {"population": 4, "prompts": 2, "steps": 1, "max_new_tokens": 6, "sigma": 0.05, "lr": 0.05, "eval_every": 0}
    kept = {
        "tokenizer": str(resolve("tiny").with_name("rwkv7-tiny.tokenizer.json")),
        "reward_workers": 0,
        "tracker": "none",
    }
    config = build(
        {
            **small,
            **kept,
            "dtype": "bf16",
            **options,
            "model": str(base),
            "run": str(tmp_path / "run"),
            "targets": {target: 1},
        }
    )
    turns = count()
    train(config, scorer=scorer_of(lambda problem, text: float(next(turns) % 3), None, "task"))  # some signal
    out = read(export(Config(run=str(tmp_path / "run"), weights="last")))
    assert [name for name in exact if not torch.equal(out[name].view(torch.uint8), exact[name].view(torch.uint8))] == [
        target
    ]


def test_nothing_beside_the_exported_file_is_replaced(run, tmp_path):
    (run.parent / "models" / "tokenizer.json").write_text("{}")
    out, state = tmp_path / "new.pth", {"blocks.0.att.time_state": torch.rand(1, 64, 64)}
    for name in ("new.pth", "new.tokenizer.json", "new-state.pth"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"{name} exists already"):
            export_params({**layers(), **state}, run.parent / "models" / NAME, out)
        if name != "new-state.pth":
            with pytest.raises(ConfigError, match=f"{name} exists already"):
                export(Config(run=str(run), out=str(out)))
        assert [path.name for path in tmp_path.glob("new*")] == [name] and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_what_is_not_written_may_be_there(run, tmp_path):
    (run.parent / "models" / "tokenizer.json").write_text("{}")
    for folder in (run, tmp_path):  # the run's own export, and one elsewhere
        name = NAME.removesuffix(".pth") if folder == run else "new"
        beside = {f"{name}-state.pth": "mine", f"{name}.tokenizer.json": "{}"}
        for path, text in beside.items():
            (folder / path).write_text(text)
        export(Config(run=str(run), out="" if folder == run else str(tmp_path / "new.pth")))
        assert {path: (folder / path).read_text() for path in beside} == beside


@pytest.mark.parametrize(("noted", "bits"), [("float32", 0.5), ("bfloat16", 0.5 + 2**-11), ("", 0.5 + 2**-11)])
def test_what_has_moved_onto_the_rounded_base_is_kept_if_the_base_was_not_rounded(tmp_path, noted, bits):
    base = tmp_path / "base.pth"
    torch.save({name: tensor.half() for name, tensor in layers(0.5 + 2**-11).items()}, base)  # 0.5 in bf16
    with Ledger.open(tmp_path / "run", to_dict(Config()), base, {"engine_dtype": noted}) as ledger:
        ledger.append(Step(0, [[1.0]], [0.0], 0.1, 0.1, 1, 0.1, checksum(layers(0.5))))
        ledger.save_snapshot(1, layers(0.5), {}, 0.5)
    assert value(export(Config(run=str(tmp_path / "run")))) == bits


def test_a_run_notes_once_what_its_base_was_rounded_to(tmp_path):
    train_small(tmp_path / "run", steps=1, schedule="constant")
    config = tmp_path / "run" / "config.yaml"
    assert "engine_dtype: float32\n" in config.read_text()
    config.write_text(config.read_text().replace("engine_dtype: float32\n", ""))  # by an earlier release
    train_small(tmp_path / "run", steps=2, schedule="constant")
    assert "engine_dtype: ''\n" in config.read_text()


def test_a_tokenizer_that_is_there_already_stays(run, tmp_path):
    beside = run.parent / "models" / f"{NAME.removesuffix('.pth')}.tokenizer.json"
    beside.write_text("{}")
    out = beside.with_name(f"{NAME.removesuffix('.pth')}.safetensors")
    assert export(Config(run=str(run), out=str(out))) == out and beside.read_text() == "{}"


def test_the_tokenizer_that_the_run_was_made_with_comes_along(run, tmp_path):
    (run.parent / "models" / "tokenizer.json").write_text("other")
    (tmp_path / "good.json").write_text("good")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: auto", f"tokenizer: {tmp_path / 'good.json'}"))
    export(Config(run=str(run), out=str(tmp_path / "a.pth")))
    assert (tmp_path / "a.tokenizer.json").read_text() == "good"
