"""Sizes of a model that is not loaded: by name, or from the header of a file."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from checkpoints import random_params
from safetensors.torch import save_file

from rwkv_es.model.layout import Arch, expected_shapes
from rwkv_es.pretrained.header import SIZES, describe, read_header
from rwkv_es.system.errors import CheckpointError, ConfigError

SMALL = Arch(2, 128, 2, 64, 50, 512, 8, 8, 8, 16)


@pytest.mark.parametrize(
    ("size", "billions"),
    [("0.1b", 0.19), ("0.4b", 0.45), ("1.5b", 1.53), ("2.9b", 2.95), ("7.2b", 7.2), ("13.3b", 13.27)],
)
def test_a_released_size_has_as_many_weights_as_its_name_says(size, billions):
    shapes = expected_shapes(describe(size).arch)
    entries = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert entries / 1e9 == pytest.approx(billions, rel=0.01)
    assert describe(size.upper()) == describe(size) == describe(size[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_files_sizes_are_those_of_its_tensors(tmp_path, dtype, suffix):
    path, params = tmp_path / f"m{suffix}", random_params(2, 128, 50, dtype=dtype)
    save_file(params, path) if suffix == ".safetensors" else torch.save(params, path)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert describe(str(path)) == (SMALL, name, path.name)


def test_parameters_and_a_modules_state_dict_are_read_too(tmp_path):
    params = {name: torch.nn.Parameter(w) for name, w in random_params(2, 128, 50).items()}
    torch.save(
        torch.nn.ParameterDict({name.replace(".", "/"): w for name, w in params.items()}).state_dict(),
        tmp_path / "s.pth",
    )
    with pytest.raises(CheckpointError, match=r"emb\.weight is missing"):
        read_header(tmp_path / "s.pth")  # read, and not of this layout
    torch.save(params, tmp_path / "m.pth")
    assert read_header(tmp_path / "m.pth").arch == SMALL


def test_no_value_is_read(tmp_path):
    torch.save(random_params(2, 128, 50), tmp_path / "m.pth")
    whole = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").write_bytes(whole.replace(b"\x3f\x80", b"\xff\xff"))
    assert read_header(tmp_path / "m.pth").arch == SMALL


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('run')",))


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save({**random_params(1, 128, 50), "x": Trap()}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="no readable header"):
        read_header(tmp_path / "m.pth")


def damaged(kind, path):
    if kind == "text":
        path.write_text("hello, this is a text")
    elif kind == "long":
        path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    elif kind == "shapeless":
        head = json.dumps({"emb.weight": {"dtype": "F32"}}).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head)
    else:
        torch.save({"model": random_params(1, 128, 50)}, path)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("text", "m.pth", "is a text"),
        ("text", "m.safetensors", "is a text"),
        ("long", "m.safetensors", "header would have 1152921504606846976 bytes"),
        ("shapeless", "m.safetensors", "no readable header"),
        ("nested", "m.pth", "no tensors"),
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path, kind, name, words):
    damaged(kind, tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}.*{words}"):
        read_header(tmp_path / name)


def entry(dtype="F32", shape=(2, 3), end=24):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (entry(shape=(9, 3)), "claims more values"),
        (entry(shape=(50, 128), end=50 * 128 * 4), "claims more values"),  # beyond the end of the file
        (entry(shape=(2,) * 100_000), "no shape of a tensor"),
        (entry(shape=(-2, -3)), "no values"),
        (entry(shape=(0, 64), end=0), "no values"),
        (entry(shape=(9**9,) * 8), "claims more values"),
    ],
)
def test_what_a_header_claims_has_to_be_in_the_file(tmp_path, tensor, words):
    head = json.dumps({"emb.weight": tensor}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(24))
    with pytest.raises(CheckpointError, match=f"emb.weight .*{words}") as caught:
        read_header(tmp_path / "m.safetensors")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("size", [(40, 64), (32, 640)])
def test_what_a_pth_claims_has_to_be_in_the_file(tmp_path, size):
    params = random_params(1, 64, 32)
    torch.save({**params, "emb.weight": torch.zeros(1, 1).expand(*size)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"emb\.weight claims more values than the file holds"):
        read_header(tmp_path / "m.pth")
    shared = torch.zeros(64, 64)
    torch.save({f"w{i}": shared for i in range(50)}, tmp_path / "n.pth")
    with pytest.raises(CheckpointError, match="claims more values"):
        read_header(tmp_path / "n.pth")


@pytest.mark.parametrize("dtype", ["\x1b[2J", "F" * 1_000_000, "F64", {}, ["F32"]])
def test_a_dtype_of_a_file_is_shown_short_and_harmless(tmp_path, dtype):
    save_file(random_params(1, 64, 32), tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["emb.weight"]["dtype"] = dtype
    head = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data[end:])
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / "m.safetensors")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_what_is_neither_size_nor_file_is_refused():
    with pytest.raises(ConfigError, match=r"'8b' is no file and no released size \(0\.1b, .*tiny\)"):
        describe("8b")
    with pytest.raises(CheckpointError, match=r"none\.pth.* does not exist"):
        describe("none.pth")
    assert describe("tiny").arch.n_embd == 64
    assert len(SIZES) == 6


def test_it_needs_no_torch():
    code = (
        "import sys; from rwkv_es.pretrained.header import describe; describe('tiny'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
