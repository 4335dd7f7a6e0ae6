"""Hugging Face directories that leave a run, and exports that are not what was asked for."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import random_params
from directories import fla, linears, prefixed, write_directory
from safetensors import SafetensorError
from small_runs import run as train_small

from rwkv_es.cli import main
from rwkv_es.pretrained import checkpoint, directory, written
from rwkv_es.pretrained.checkpoint import load, resolve, save
from rwkv_es.pretrained.exported import export_directory, export_params
from rwkv_es.pretrained.tokenizer import json_beside, load_tokenizer
from rwkv_es.system.errors import CheckpointError, ConfigError

needs_hf = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rwkv7_hf", "transformers"))),
    reason="needs the extra hf: pip install rwkv-es[hf]",
)


@pytest.fixture
def base(tmp_path):
    params = random_params(3, 128, 64, dtype=torch.bfloat16)
    params["blocks.1.att.w0"] = params["blocks.1.att.w0"].float() / 3  # as the official directories hold some
    folder = write_directory(tmp_path / "base", params, num_shards=3, norm_eps=1e-5)
    (folder / "tokenizer.json").write_bytes(json_beside(resolve("tiny")).read_bytes())
    (folder / "modeling.py").write_text("print('a model')")
    (folder / "README.md").write_text("about the base")
    return folder


@pytest.mark.parametrize("naming", [fla, linears, prefixed])
def test_a_directory_that_is_read_and_written_back_has_the_same_bytes(tmp_path, base, naming):
    base = base if naming is fla else write_directory(tmp_path / "other", random_params(2, 64, 32), naming)
    export_directory(load(base)[0], base, tmp_path / "back")
    for file in base.iterdir():
        if file.name != "README.md":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file
    assert checkpoint.sha256(tmp_path / "back") == checkpoint.sha256(base)
    assert not (tmp_path / "back" / "README.md").exists(), "which is about another model"


def test_a_run_from_a_directory_leaves_one_of_its_form(tmp_path, capsys):
    base = write_directory(tmp_path / "small", load(resolve("tiny"))[0], linears, 2)
    shutil.copyfile(json_beside(resolve("tiny")), base / "tokenizer.json")
    run = train_small(tmp_path / "run", model=str(base), steps=2)
    out = tmp_path / "tuned"
    assert main(["export", str(run), "--weights", "last", "--format", "hf", "--out", str(out)]) == 0
    assert f"wrote {out} (weights after 2 steps)" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in base.iterdir()}
    main(["export", str(run), "--weights", "last", "--out", str(tmp_path / "tuned.safetensors")])
    tuned = load(tmp_path / "tuned.safetensors")[0]
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in load(out)[0].items())
    assert not torch.equal(tuned["head.weight"], load(base)[0]["head.weight"])
    assert main(["eval", str(out), "--task", "countdown_mini", "--eval-size", "2", "--reward-workers", "0"]) == 0


def test_a_directory_that_finds_no_room_is_a_sentence_and_leaves_nothing(tmp_path, base, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ConfigError, match=r"cannot write .*out \(Error .*No space left.*make room there"):
        export_directory(load(base)[0], base, tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


@needs_hf
def test_a_run_from_a_file_leaves_a_directory_with_its_tokenizer(tmp_path):
    run = train_small(tmp_path / "run", steps=1)
    out = tmp_path / "tuned-hf"
    assert main(["export", str(run), "--weights", "last", "--format", "hf", "--out", str(out)]) == 0
    tokenizer = load_tokenizer("auto", out, 115)
    code = (
        "from transformers import AutoTokenizer;"
        f"print(AutoTokenizer.from_pretrained({str(out)!r}, trust_remote_code=True)('12+3').input_ids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == tokenizer.encode("12+3")
    assert not (out / "official.pth").exists()


def test_what_cannot_become_a_directory_is_said(tmp_path, base, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there exists already"):
        export_directory(load(base)[0], base, tmp_path / "there")
    run = train_small(tmp_path / "run", steps=1)
    for flags, words in (
        (("--format", "hf"), "needs a place"),
        (("--format", "pth", "--out", "a.safetensors"), "say different things"),
    ):
        assert main(["export", str(run), *flags]) == 2
        assert words in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rwkv7_hf" else find(name))
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "out")]) == 2
    assert "pip install rwkv-es[hf]" in capsys.readouterr().err
    assert not any("out" in path.name for path in tmp_path.iterdir())


def _wrong_value(name):
    def change(params):
        changed = params[name].clone()
        changed.flatten()[-1] += 1
        return {**params, name: changed}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_wrong_value("blocks.0.ffn.key.weight"), r"has other values in blocks\.0\.ffn\.key\.weight"),
        (lambda p: {name: w for name, w in p.items() if name != "blocks.0.ln0.bias"}, r"lacks blocks\.0\.ln0\.bias"),
        (lambda p: {**p, "blocks.0.att.time_state": torch.zeros(1, 64, 64)}, "has more tensors"),
        (lambda p: {**p, "ln_out.bias": p["ln_out.bias"].double()}, r"has other values in ln_out\.bias"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_reads_back_as_something_else_does_not_stay(tmp_path, monkeypatch, change, words, suffix):
    base, out = tmp_path / "base.pth", tmp_path / f"out{suffix}"
    params = random_params(1, 64, 8)
    save(base, params)
    write = checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda params, *place: write(change(params), *place))
    with pytest.raises(CheckpointError, match=words) as caught:
        export_params(params, base, out)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["base.pth"]


def test_an_export_of_before_stays_where_a_new_one_fails(tmp_path, monkeypatch, capsys):
    run = train_small(tmp_path / "run", steps=1)
    assert main(["export", str(run)]) == 0
    before = (run / "rwkv7-tiny.pth").read_bytes()
    monkeypatch.setattr(written, "logits_of", lambda params, arch: torch.rand(8))
    assert main(["export", str(run), "--weights", "last"]) == 2
    assert "answers with other logits when it is read back, so nothing of it was kept" in capsys.readouterr().err
    assert (run / "rwkv7-tiny.pth").read_bytes() == before


def test_a_directory_that_reads_back_as_something_else_does_not_stay(tmp_path, base, monkeypatch):
    stored = directory._stored
    monkeypatch.setattr(directory, "_stored", lambda *place: stored(*place) * 2)
    with pytest.raises(CheckpointError, match="has other values in"):
        export_directory(load(base)[0], base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_logits_tell_a_matrix_that_is_turned():
    params = random_params(2, 64, 8)
    save_as = {**params, "blocks.1.att.key.weight": params["blocks.1.att.key.weight"].T}
    arch = checkpoint.infer("", params)
    assert (written.logits_of(params, arch) - written.logits_of(save_as, arch)).abs().max() > 1e-2


def test_a_tuned_state_lies_in_the_directory(tmp_path, base):
    state = {f"blocks.{i}.att.time_state": torch.rand(2, 64, 64) for i in range(3)}
    files = export_directory({**load(base)[0], **state}, base, tmp_path / "out")
    assert files == [tmp_path / "out", tmp_path / "out" / "initial-state.pth"]
    found = checkpoint.load_state(files[1], load(base)[1])
    assert all(torch.equal(found[name], state[name]) for name in state)
