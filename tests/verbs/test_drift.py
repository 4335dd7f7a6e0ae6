"""Perplexity and KL on a text file, against float64 numpy."""

import json
import math
from dataclasses import replace

import libraries
import numpy as np
import pytest
import reference
import torch

from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.pretrained import checkpoint
from rwkv_es.pretrained.tokenizer import load_tokenizer
from rwkv_es.system.errors import ConfigError
from rwkv_es.verbs import drift
from rwkv_es.verbs.evaluate import evaluate

TEXT = "3 7 10=24:\n3+7=10,+20-0*100<answer>(3+7)+10</answer>\n4 5 6=15:<answer>(4+5)+6</answer>"


@pytest.fixture(scope="module")
def tiny():
    path = checkpoint.resolve("tiny")
    params, arch = checkpoint.load(path)
    return path, params, load_tokenizer("auto", path, arch.n_vocab)


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory):
    """A checkpoint that has moved a little: its path and tensors."""
    path, params, _ = tiny
    folder = tmp_path_factory.mktemp("other")
    noise = torch.randn(params["head.weight"].shape, generator=torch.Generator().manual_seed(0))
    moved = {**params, "head.weight": (params["head.weight"].float() + 0.02 * noise).to(params["head.weight"].dtype)}
    checkpoint.save(folder / "other.pth", moved)
    (folder / "other.tokenizer.json").write_bytes(path.with_name("rwkv7-tiny.tokenizer.json").read_bytes())
    return folder / "other.pth", moved


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def log_probabilities(params, ids, chunk):
    """Return the distributions (T,V) that chunks of the ids are predicted from, each after token 0."""
    scores = np.concatenate(
        [reference.logits(params, [0, *ids[i : i + chunk]])[:-1] for i in range(0, len(ids), chunk)]
    )
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [512, 16])
def test_perplexity_bits_and_kl_equal_float64_numpy(tiny, other, file, chunk, monkeypatch, capsys):
    monkeypatch.setattr(drift, "CHUNK", chunk)
    result = evaluate(Config(model=str(other[0]), base="tiny", text=file, threads=1))
    ids = tiny[2].encode(TEXT)
    before, after = log_probabilities(tiny[1], ids, chunk), log_probabilities(other[1], ids, chunk)
    nll = -sum(after[i, token] for i, token in enumerate(ids))
    assert result["tokens"] == len(ids) and result["bytes"] == len(TEXT)
    # 1e-4: fp32 against float64
    assert result["perplexity"] == pytest.approx(math.exp(nll / len(ids)), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(TEXT), rel=1e-4)
    assert result["base"]["nll_per_token"] == pytest.approx(
        -np.mean([before[i, t] for i, t in enumerate(ids)]), rel=1e-4
    )
    kl = (np.exp(before) * (before - after)).sum(-1).mean()
    assert kl > 1e-3
    assert result["kl_per_token"] == pytest.approx(kl, rel=1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result
    assert "KL(base || tuned)" in lines[-2]


def test_one_model_alone_and_the_command_line(tiny, file, capsys):
    assert main(["eval", "tiny", "--text", file, "--threads", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "base" not in result and "kl_per_token" not in result
    ids = tiny[2].encode(TEXT)
    rows = log_probabilities(tiny[1], ids, 512)
    assert result["nll_per_token"] == pytest.approx(-np.mean([rows[i, t] for i, t in enumerate(ids)]), rel=1e-4)


def test_a_model_has_not_drifted_from_itself(file, capsys):
    assert evaluate(Config(base="tiny", text=file, threads=1))["kl_per_token"] == 0.0


def test_bytes_are_counted_as_in_the_file(tmp_path):
    (tmp_path / "crlf.txt").write_bytes(b"a\r\nb\xc3\xa9")
    assert len(drift._read_text(str(tmp_path / "crlf.txt")).encode()) == 6


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), (b"\xff\xfe", "is UTF-16"), (b"", "is empty")]
)
def test_what_is_no_text_is_refused(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        evaluate(Config(text=str(path), threads=1))


def test_models_of_different_tokens_are_refused(other, file, tmp_path):
    tokenizer = json.loads(other[0].with_name("other.tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["3"], vocab["7"] = vocab["7"], vocab["3"]
    (tmp_path / "swapped.tokenizer.json").write_text(json.dumps(tokenizer))
    checkpoint.save(tmp_path / "swapped.pth", other[1])
    with pytest.raises(ConfigError, match="different tokens"):
        evaluate(Config(model=str(tmp_path / "swapped.pth"), base="tiny", text=file, threads=1))


@pytest.mark.bits
@pytest.mark.parametrize("engine", ["torch", "numba"])
def test_slots_change_no_bit_of_perplexity_and_kl(other, file, monkeypatch, engine):
    libraries.install(monkeypatch, lambda rows: rows == 8)  # MKL on CPUs with AVX-512
    monkeypatch.setattr(drift, "CHUNK", 2)
    config = Config(model=str(other[0]), base="tiny", text=file, threads=1, engine=engine)
    found = [evaluate(replace(config, slots=slots)) for slots in (1, 8, 24, 64)]
    assert found[1:] == found[:-1] and found[0]["kl_per_token"] > 0
