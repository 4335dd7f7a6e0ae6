import io
import os
import pickle
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import random_params
from safetensors import SafetensorError
from safetensors.torch import save_file

from rwkv_es.pretrained.checkpoint import load, load_state, resolve, save, sha256
from rwkv_es.pretrained.header import describe
from rwkv_es.system.errors import CheckpointError


@pytest.fixture
def params():
    return random_params(2, 128, 40, ranks=(8, 16, 24, 32))


def written(tmp_path, params, name="model.pth"):
    path = tmp_path / name
    torch.save(params, path)
    return path


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text and path.name in text
    return text


def test_everything_is_inferred_from_the_tensors(tmp_path, params):
    _, arch = load(written(tmp_path, params))
    assert arch._asdict() == {
        **{"n_layer": 2, "n_embd": 128, "n_head": 2, "head_size": 64, "n_vocab": 40, "n_ffn": 512},
        **{"rank_w": 8, "rank_a": 16, "rank_v": 24, "rank_g": 32},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_is_read_as_it_is(tmp_path, dtype):
    params = random_params(1, 64, 20, dtype=dtype)
    loaded, _ = load(written(tmp_path, params))
    assert list(loaded) == list(params)
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == dtype for name, tensor in params.items())


def test_block_0_may_lack_its_unused_value_mix_or_have_it_in_any_rank(tmp_path, params):
    for name in ("v0", "v1", "v2"):
        del params[f"blocks.0.att.{name}"]
    assert load(written(tmp_path, params))[1].rank_v == 24
    params["blocks.0.att.v1"], params["blocks.0.att.v2"] = torch.zeros(128, 5), torch.zeros(5, 128)
    assert load(written(tmp_path, params))[1].rank_v == 24


def test_other_containers(tmp_path, params):
    save_file(params, tmp_path / "model.safetensors")
    assert load(tmp_path / "model.safetensors")[1].n_layer == 2
    torch.save(params, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load(tmp_path / "old.pth")[1].n_layer == 2
    params.update({f"blocks.{i}.att.time_state": torch.zeros(2, 64, 64) for i in range(2)})
    assert len(load(written(tmp_path, params))[0]) == 33 * 2 + 6 + 2


def test_weights_are_memory_mapped_and_the_file_is_never_changed(tmp_path, params):
    path = written(tmp_path, params)
    before = sha256(path)
    loaded, _ = load(path)
    loaded["emb.weight"].fill_(3.0)
    assert sha256(path) == before
    assert f"{path}" in Path("/proc/self/maps").read_text() or sys.platform != "linux"


def test_the_width_of_the_ffn_is_any_number(tmp_path, params):
    for i in range(2):
        params[f"blocks.{i}.ffn.key.weight"] = torch.randn(301, 128)
        params[f"blocks.{i}.ffn.value.weight"] = torch.randn(128, 301)
    assert load(written(tmp_path, params))[1].n_ffn == 301


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_an_initial_state_has_a_dtype_of_its_own_beside_bf16_weights(tmp_path, params, state_dtype):
    params = {name: tensor.bfloat16() for name, tensor in params.items()}
    states = {f"blocks.{i}.att.time_state": torch.rand(2, 64, 64).to(state_dtype) for i in range(2)}
    loaded, _ = load(written(tmp_path, {**params, **states}))
    for name, state in states.items():
        assert loaded[name].dtype == state_dtype and torch.equal(loaded[name], state)
    assert loaded["emb.weight"].dtype == torch.bfloat16


def test_a_state_file_is_read_as_it_is_and_fits_the_model(tmp_path, params):
    _, arch = load(written(tmp_path, params))
    states = {f"blocks.{i}.att.time_state": torch.rand(2, 64, 64) for i in range(2)}
    loaded = load_state(written(tmp_path, states, "state.pth"), arch)
    assert all(torch.equal(loaded[name], state) for name, state in states.items())
    wrong = {"more": {**states, "x": torch.zeros(1)}, "less": dict(list(states.items())[:1])}
    wrong["float64"] = {name: state.double() for name, state in states.items()}
    wrong["infinite"] = {name: state + torch.inf for name, state in states.items()}
    words = {"more": "x is", "less": "is missing", "float64": r"torch\.float64", "infinite": "not finite"}
    for case, content in wrong.items():
        with pytest.raises(CheckpointError, match=words[case]):
            load_state(written(tmp_path, content, "state.pth"), arch)


EMB_AND_HEAD, LAST = ("emb.weight", "head.weight"), torch.tensor([32999])
WRONG = {
    "missing": (lambda p: p.pop("blocks.1.att.w2"), r"blocks\.1\.att\.w2 is missing"),
    "several missing": (lambda p: [p.pop(f"blocks.1.att.{n}") for n in ("a0", "w2")], "missing"),
    "no embedding": (lambda p: p.pop("emb.weight"), r"emb\.weight is missing"),
    "no r_k": (lambda p: p.pop("blocks.0.att.r_k"), r"blocks\.0\.att\.r_k is missing"),
    "a whole block": (lambda p: [p.pop(n) for n in list(p) if n.startswith("blocks.0.")], r"blocks\.0\."),
    "extra": (lambda p: p.update({"blocks.1.att.extra": torch.zeros(3)}), r"blocks\.1\.att\.extra"),
    "wrong shape": (
        lambda p: p.update({"blocks.1.ffn.key.weight": torch.zeros(512, 64)}),
        r"blocks\.1\.ffn\.key\.weight",
    ),
    "transposed": (lambda p: p.update({"blocks.0.att.w1": p["blocks.0.att.w1"].T.contiguous()}), r"blocks\.0\.att\.w"),
    "one rank differs": (lambda p: p.update({"blocks.1.att.g1": torch.zeros(128, 9)}), r"blocks\.1\.att\.g1"),
    "flat vector": (lambda p: p.update({"blocks.1.att.x_r": torch.zeros(128)}), r"blocks\.1\.att\.x_r"),
    "mixed dtypes": (
        lambda p: p.update({"head.weight": p["head.weight"].bfloat16()}),
        r"head\.weight is torch\.bfloat16",
    ),
    "integers": (lambda p: p.update({"head.weight": p["head.weight"].to(torch.int8)}), r"head\.weight is torch\.int8"),
    "NaN": (lambda p: p["blocks.1.att.key.weight"][77].fill_(torch.nan), r"blocks\.1\.att\.key\.weight.*not finite"),
    "all int8": (
        lambda p: p.update({name: torch.ones_like(tensor, dtype=torch.int8) for name, tensor in p.items()}),
        r"emb\.weight is torch\.int8",
    ),
    "all float64": (
        lambda p: p.update({name: tensor.double() for name, tensor in p.items()}),
        r"emb\.weight is torch\.float64",
    ),
    "NaN in the last of 4M values": (
        lambda p: p.update({n: torch.zeros(33000, 128).index_fill(0, LAST, torch.nan) for n in EMB_AND_HEAD}),
        r"emb\.weight.*not finite",
    ),
    "3 heads in the first block": (
        lambda p: p.update({"blocks.0.att.r_k": torch.zeros(3, 64)}),
        r"blocks\.0\.att\.r_k has shape \(3, 64\), but a model of width 128 needs 2 heads of size 64",
    ),
    "3 heads in the second": (
        lambda p: p.update({"blocks.1.att.r_k": torch.zeros(3, 64)}),
        r"blocks\.1\.att\.r_k has shape \(3, 64\)",
    ),
    "a state of a block that is not there": (
        lambda p: p.update({f"blocks.{i}.att.time_state": torch.zeros(2, 64, 64) for i in ("0", "01")}),
        r"no RWKV-7 .*blocks\.01\.att\.time_state",
    ),
    "infinite": (lambda p: p["ln_out.bias"][3:4].fill_(-torch.inf), r"ln_out\.bias.*not finite"),
    "empty": (lambda p: p.update({"blocks.0.att.w1": torch.zeros(128, 0)}), r"blocks\.0\.att\.w"),
    "all of a rank empty": (
        lambda p: p.update(
            {f"blocks.{i}.att.w{n}": torch.zeros((128, 0) if n == 1 else (0, 128)) for i in (0, 1) for n in (1, 2)}
        ),
        r"blocks\.0\.att\.w1 is empty",
    ),
    "sparse": (lambda p: p.update({"head.weight": p["head.weight"].to_sparse()}), r"head\.weight.*no plain tensor"),
    "head size 32": (lambda p: p.update({"blocks.0.att.r_k": torch.zeros(4, 32)}), r"blocks\.0\.att\.r_k.*size 64"),
    "x070a": (lambda p: p.update({"blocks.0.ffn.s_emb.weight": torch.zeros(40, 32)}), r"x070a.*s_emb"),
    "x070b": (lambda p: p.update({"blocks.0.att.qkv.weight": torch.zeros(4, 4)}), r"x070b.*qkv"),
    "half a state": (lambda p: p.update({"blocks.1.att.time_state": torch.zeros(2, 64, 64)}), "1 of 2 layers"),
    "a state of another shape": (lambda p: p.update({"blocks.1.att.time_state": torch.zeros(2, 32, 64)}), "time_state"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_is_not_right_is_refused_by_the_name_of_the_tensor(tmp_path, params, case):
    change, message = WRONG[case]
    change(params)
    text = refusal(written(tmp_path, params))
    assert re.search(message, text), text


@pytest.mark.parametrize("number", ["999999999", "9" * 30, "9" * 5000, "2000"])
@pytest.mark.parametrize("name", ["x", "att.v1"])
def test_a_stray_tensor_of_a_block_with_a_large_number_is_refused_at_once(tmp_path, params, number, name):
    params[f"blocks.{number}.{name}"] = torch.zeros(128, 24)
    path = written(tmp_path, params)
    start = time.monotonic()
    assert f"blocks.{number}"[:50] in refusal(path)
    assert time.monotonic() - start < 2  # names of 999999999 blocks would take minutes and all memory


OTHERS = {
    "v4": ({"emb.weight": 0, "blocks.0.att.time_decay": 0, "blocks.0.att.time_first": 0}, "RWKV-4"),
    "v5": ({"emb.weight": 0, "blocks.0.att.time_mix_g": 0, "blocks.0.att.time_decay": 0}, "RWKV-5"),
    "v6": ({"emb.weight": 0, "blocks.0.att.time_maa_x": 0, "blocks.0.att.time_faaaa": 0}, "RWKV-6"),
    "another library": ({"model.layers.0.attn.r_proj.weight": 0}, "another library"),
    "wrapped": ({"module.emb.weight": 0}, "trainer"),
    "state alone": ({"blocks.0.att.time_state": 0, "blocks.1.att.time_state": 0}, "initial state alone"),
    "something else": ({"layer.weight": 0}, "no RWKV-7"),
}


class Own(torch.Tensor):
    pass


STRANGE = {  # tensors without plain values of their own
    "sparse": lambda w: w.to_sparse(),
    "csr": lambda w: w.reshape(-1, 64).to_sparse_csr(),
    "meta": lambda w: w.to("meta"),
    "complex": lambda w: w.to(torch.complex64),
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "quantized by channel": lambda w: torch.quantize_per_channel(
        w, torch.ones(len(w)), torch.zeros(len(w)), 0, torch.qint8
    ),
    "nested": lambda w: torch.nested.nested_tensor([w[0], w[0][:1]]),
    "jagged": lambda w: torch.nested.nested_tensor([w[0], w[0][:1]], layout=torch.jagged),
    "subclass": lambda w: w.as_subclass(Own),
    "empty": lambda w: w[:0],
    "int": lambda w: w.int(),
    "bool": lambda w: w.bool(),
    "fp64": lambda w: w.double(),
    "fp8": lambda w: w.to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore")  # torch's, about prototypes
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_that_are_no_plain_numbers_are_one_sentence_in_weights_and_states(tmp_path, params, kind):
    _, arch = load(written(tmp_path, params))
    state = {f"blocks.{i}.att.time_state": torch.ones(2, 64, 64) for i in range(2)}
    for read, tensors, name in (
        (lambda path: load_state(path, arch), state, "blocks.1.att.time_state"),
        (load, {**params, **state}, "blocks.1.att.time_state"),
        (load, params, "blocks.0.att.r_k"),
    ):
        path = written(tmp_path, {**tensors, name: STRANGE[kind](tensors[name])}, "strange.pth")
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_negated_view_is_read_as_its_values(tmp_path, params):
    negated = torch._neg_view(params["head.weight"])
    path = written(tmp_path, {**params, "head.weight": negated})
    assert torch.equal(load(path)[0]["head.weight"].view(torch.int32), (-params["head.weight"]).view(torch.int32))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_zip_called_safetensors_is_memory_mapped_too(tmp_path, params):
    written(tmp_path, {**params, "emb.weight": torch.ones(100_000, 128)}, "a.pth").rename(tmp_path / "a.safetensors")
    code = (
        "import re, sys; from pathlib import Path; from rwkv_es.pretrained.tensors import read_tensors;"
        "held = lambda: int(re.search(r'RssAnon:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]);"
        f"before = held(); found = read_tensors(Path({str(tmp_path / 'a.safetensors')!r})); sys.exit(held() - before > 25_000)"
    )  # kB: half of the embedding
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("shape is invalid for input"), "is truncated or damaged"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (KeyError("F4"), "is truncated or damaged"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_only_a_lack_of_memory_is_called_so(tmp_path, params, monkeypatch, suffix, error, words):
    save(tmp_path / f"a{suffix}", params)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr("safetensors.torch.load_file", fail)
    assert words in refusal(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("name", ["\x1b[2J", "x" * 1_000_000, "a\nb", "\u202egnp"])
def test_no_name_of_a_tensor_reaches_the_terminal_as_it_is(tmp_path, params, name):
    path = written(tmp_path, {**params, name: torch.ones(1)})
    for read in (load, lambda path: describe(str(path))):
        with pytest.raises(CheckpointError, match="a tensor is called") as caught:
            read(path)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_recognised(tmp_path, case):
    names, message = OTHERS[case]
    assert message in refusal(written(tmp_path, {name: torch.zeros(2, 64, 64) for name in names}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (random.Random(0).randbytes(4096), "damaged"),
        (b"PK\x03\x04" + random.Random(0).randbytes(500), "damaged"),
        (b"\x80\x02J\x01", "damaged"),
        (b"\x95 begins a frame of a later pickle, but not a file", "damaged"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git-lfs"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_truncated_files(tmp_path, params, share, suffix):
    whole = tmp_path / f"whole.{suffix}"
    save(whole, params)
    data = whole.read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    assert "download it again" in refusal(path)


class Bomb:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("container", ["zip", "old", "bare"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path, params, container, protocol):
    touched, path = tmp_path / "touched", tmp_path / "model.pth"
    bomb = {**params, "bomb": Bomb(f"touch {touched}")}
    if container == "bare":
        path.write_bytes(pickle.dumps(bomb["bomb"], protocol))
    else:
        is_zip = container == "zip"
        torch.save(bomb, path, pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=is_zip)
    assert "could run code" in refusal(path)
    assert not touched.exists()


def out_of_memory(monkeypatch, *names):
    """Let torch be refused the memory for a mapping of a whole file, and others too."""
    load_file = torch.load

    def refused(*args, **options):
        if options.get("mmap"):
            raise RuntimeError("unable to mmap 99 bytes from file: Cannot allocate memory (12)")
        return load_file(*args, **options)

    def none_left(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("torch.load", refused)
    for name in names:
        monkeypatch.setattr(name, none_left)


def test_a_file_larger_than_the_memory_that_is_promised_is_mapped(tmp_path, params, monkeypatch):
    params["head.weight"] = params["emb.weight"]
    path = written(tmp_path, params)
    out_of_memory(monkeypatch)
    loaded, _ = load(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in params.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({"model": {"emb.weight": torch.zeros(1)}, "step": 3}, "no plain state dict: 'model' is a dict"),
        ("sparse", "no plain tensor"),
        ("empty", "is empty"),
    ],
)
def test_what_is_no_state_dict_is_refused_where_memory_is_short_too(tmp_path, params, monkeypatch, content, message):
    changed = {
        "sparse": {"head.weight": params["head.weight"].to_sparse()},
        "empty": {"blocks.0.att.v1": torch.zeros(128, 0)},
    }
    if isinstance(content, str):
        content = {**params, **changed[content]}
    path = written(tmp_path, content)
    out_of_memory(monkeypatch)
    assert message in refusal(path)


def test_a_file_that_cannot_be_mapped_at_all_is_said(tmp_path, params, monkeypatch):
    path = written(tmp_path, params)
    out_of_memory(monkeypatch, "mmap.mmap")
    assert "cannot be mapped (Cannot allocate memory)" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"emb.weight": torch.zeros(1)}, "step": 3}, "it holds model, step"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "not a dict of tensors"),
    ],
)
def test_torch_files_that_are_no_state_dict(tmp_path, content, message):
    assert message in refusal(written(tmp_path, content))


def test_pipes_and_impossible_names_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "no regular file" in refusal(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load("a\0b.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve("a\0b.pth")


def test_missing_files_and_folders(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pth")
    assert "is a folder" in refusal(tmp_path)
    for name, message in ((tmp_path / "none", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(CheckpointError, match=message):
            resolve(str(name))


def test_names_are_resolved_with_and_without_suffix(tmp_path, params):
    path = written(tmp_path, params, "rwkv7-g1-0.1b-20260101-ctx4096.pth")
    assert resolve(str(path)) == resolve(str(path.with_suffix(""))) == path
    assert load(resolve("tiny"))[1].n_embd == 64


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_saved_is_what_was_given(tmp_path, params, suffix):
    path = tmp_path / f"model.{suffix}"
    save(path, params)
    loaded, _ = load(path)
    assert set(loaded) == set(params) and (suffix == "safetensors" or list(loaded) == list(params))
    for name, tensor in params.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype and loaded[name].is_contiguous()
    assert os.listdir(tmp_path) == [path.name]


def test_a_view_of_something_large_is_saved_alone(tmp_path, params):
    params["head.weight"] = torch.randn(4000, 128)[:40]
    params["emb.weight"] = torch.randn(128, 40).T
    save(tmp_path / "model.pth", params)
    plain = sum(tensor.numel() * 4 for tensor in params.values())
    assert (tmp_path / "model.pth").stat().st_size < plain + 200 * len(params) + 65536
    loaded, _ = load(tmp_path / "model.pth")
    assert all(torch.equal(tensor, params[name]) and tensor.is_contiguous() for name, tensor in loaded.items())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_tensors_that_share_their_memory_are_saved(tmp_path, params, suffix):
    path = tmp_path / f"model.{suffix}"
    params["head.weight"] = params["emb.weight"]
    params["blocks.1.att.key.weight"] = params["blocks.0.att.key.weight"].view(128, 128)
    save(path, params)
    loaded, _ = load(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in params.items())


def test_what_safetensors_cannot_write_is_said(tmp_path, params, monkeypatch):
    def refused(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", refused)
    with pytest.raises(CheckpointError, match=r"cannot write .*\.safetensors \(Error .* No space left .*untouched$"):
        save(tmp_path / "model.safetensors", params)
    assert not os.listdir(tmp_path)


def folder_flush(monkeypatch, error=None):
    """Note the names in each folder that is flushed, and let it fail."""
    notes, fsync = [], os.fsync

    def noted(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            notes.append(os.listdir(handle))
            if error is not None:
                raise error
        fsync(handle)

    monkeypatch.setattr("os.fsync", noted)
    return notes


def test_the_folder_is_flushed_when_the_file_has_its_name(tmp_path, params, monkeypatch):
    notes = folder_flush(monkeypatch)
    save(tmp_path / "model.pth", params)
    assert notes == [["model.pth"]]


def test_a_folder_that_cannot_be_flushed_is_told_from_a_file_that_is_not_written(tmp_path, params, monkeypatch):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    folder_flush(monkeypatch, OSError(5, "Input/output error"))
    with pytest.raises(CheckpointError, match=r"model\.pth is written, but .*\(Input/output error\)") as caught:
        save(path, params)
    assert "untouched" not in str(caught.value)
    assert load(path)[1].n_layer == 2


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_disk_that_is_full_leaves_the_old_file(tmp_path, params, monkeypatch, where):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync" if where == "write" else "pathlib.Path.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(path, params)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pth"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (". unexpected pos 64 vs 0", "not all of it found room: the disk is full, or the file larger than it may be"),
        (". open file failed with strerror: Read-only file system", "Read-only file system"),
    ],
)
def test_what_torch_says_of_its_archive_is_said_in_words(tmp_path, params, monkeypatch, said, words):
    def failing(*_):
        raise RuntimeError(f"[enforce fail at inline_container.cc:672] {said}")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "model.pth", params)
    assert str(caught.value).startswith(f"cannot write {tmp_path}/model.pth ({words}); ")


def test_a_folder_that_is_not_there(tmp_path, params):
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tmp_path / "none" / "model.pth", params)


def test_a_kill_in_the_middle_of_saving_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    code = (
        "import sys, torch; from rwkv_es.pretrained.checkpoint import save\n"
        "print('saving', flush=True)\n"
        "save(sys.argv[1], {'w': torch.zeros(1 << 28)})"  # 1 GB: it takes a while
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"saving\n"
        while process.poll() is None and not any(p.stat().st_size for p in tmp_path.glob(".model.pth.partial")):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the file was complete before the kill"
    assert path.read_bytes() == b"old"


def test_a_saved_file_is_loaded_by_the_rwkv_package(tmp_path, params):
    save(tmp_path / "model.pth", params)
    code = (
        "import os, sys; os.environ['RWKV_V7_ON'] = '1'\n"
        "from rwkv.model import RWKV_x070\n"
        "logits, _ = RWKV_x070(sys.argv[1], 'cpu fp32').forward([1, 2], None)\n"
        "sys.exit(not logits.isfinite().all())"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("is_zip", [True, False])
def test_an_unreadable_torch_file_never_escapes_as_another_error(tmp_path, is_zip):
    """Flip bytes everywhere: either the file is still fine, or it is refused."""
    buffer = io.BytesIO()
    torch.save(random_params(1, 64, 8), buffer, _use_new_zipfile_serialization=is_zip)
    data = buffer.getvalue()
    generator = torch.Generator().manual_seed(0)
    places = [*torch.randint(0, 4000, (60,), generator=generator).tolist(), *range(len(data) - 300, len(data), 7)]
    for place in places:
        broken = bytearray(data)
        broken[place] ^= 0xFF
        path = tmp_path / "model.pth"
        path.write_bytes(broken)
        try:
            load(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
