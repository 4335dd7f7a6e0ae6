"""A file is what its first bytes say; and what describes its tensors is looked at before it is unpickled."""

import bz2
import gzip
import io
import lzma
import pickle
import struct
import tarfile
import time
import zipfile

import pytest
import torch
from checkpoints import random_params
from safetensors.torch import save_file

from rwkv_es.pretrained.checkpoint import load, save
from rwkv_es.pretrained.formats import kind_of
from rwkv_es.pretrained.header import describe
from rwkv_es.system.errors import CheckpointError


@pytest.fixture
def params():
    return random_params(1, 64, 32)


def tar():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"), io.BytesIO())
    return data.getvalue()


def zipped(**entries):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.ckpt", "m"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF\3\0\0\0" + b"\1" * 99, "GGUF"),
        (b"fmgg" + b"\1" * 99, "rwkv.cpp"),
        (gzip.compress(b"x", mtime=0), "packed by gzip; unpack it"),
        (tar(), "tar archive"),
        (zipped(readme="text"), "zip archive without a model"),
        (b"\x93NUMPY\1\0" + b" " * 99, "NumPy"),
        (b"\n <?xml version='1.0'?><Error/>", "a web page"),
        (b"  <!DOCTYPE html><html>", "a web page"),
        (b'{"metadata": {"total_size": 1}, "weight_map": {}}', "the index of a model in several files"),
        (b'{"error": "Entry not found"}', "an error message of the place"),
        (b"Entry not found", "is a text"),
        (b"PK is how this text begins", "is a text"),
        ("Eintrag „rwkv“ nicht gefunden — das Modell heißt anders, und diese Zeile ist lang".encode(), "is a text"),
        ("没有这个文件，请检查名称。".encode(), "is a text"),
        ("Le modèle n'existe pas: vérifiez son nom, s'il vous plaît".encode("cp1252"), "is a text"),
        ("not found".encode("utf-16"), "is a text"),
        ("not found".encode("utf-16-le"), "is a text"),
        ("not found".encode("utf-32"), "is a text"),
        ("<html>".encode("utf-16"), "a web page"),
        (b"\xef\xbb\xbf<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbf" + b'{"error": "Entry not found"}', "an error message of the place"),
        (b'{"metadata": {"title": "' + b"x" * 99 + b'"}, "weight_map": {}}', "the index of a model"),
        (b"\x08\x07\x12\x07pytorch\x1a\x05" + b"2.1.0", "an ONNX model"),
        (b"\x08\x0a:\xd6\x91\x0a" + bytes(range(99)), "an ONNX model"),
        (b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(range(99)), "packed by lz4"),
        (lzma.compress(b"x", lzma.FORMAT_ALONE), "packed by lzma"),
        (bz2.compress(b"x"), "packed by bzip2"),
        (lzma.compress(b"x"), "packed by xz"),
        (b"\x1c\0\0\0TFL3" + bytes(range(99)), "TensorFlow Lite"),
        (b"\x89PNG\r\n\x1a\n", "a picture"),
        (b"PAR1\x15\4", "a parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
        (b"\0" * 4096, "nothing but zeros"),
        (b"", "is empty"),
    ],
)
def test_other_files_are_called_what_they_are_whatever_their_name(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    for read in (load, lambda path: describe(str(path))):
        with pytest.raises(CheckpointError, match=words) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_weights_are_read_under_the_wrong_suffix(tmp_path, params):
    save(tmp_path / "a.pth", params)
    (tmp_path / "a.pth").rename(tmp_path / "a.safetensors")
    save_file(params, tmp_path / "b.pth")
    for name, kind in (("a.safetensors", "zip"), ("b.pth", "safetensors")):
        assert kind_of(tmp_path / name) == kind
        assert load(tmp_path / name)[1] == describe(str(tmp_path / name)).arch


@pytest.mark.parametrize("size", [0x8B1F, 0x9D1F, 0x2222])  # like gzip, compress, a text
def test_a_safetensors_header_of_any_length_is_one(tmp_path, params, size):
    save_file(params, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", size) + data[8:end].rstrip().ljust(size) + data[end:])
    assert load(tmp_path / "m.safetensors")[1] == describe(str(tmp_path / "m.safetensors")).arch


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model.safetensors", "refs/main"])
def test_a_hugging_face_directory_is_called_so(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="Hugging Face directory"):
        describe(str(tmp_path))


def test_a_folder_names_what_is_in_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder; give a \.pth or \.safetensors file"):
        describe(str(tmp_path))
    deep = tmp_path / "snapshots" / "0123" / "rwkv7.pth"
    deep.parent.mkdir(parents=True)
    deep.write_bytes(b"")
    for folder in (tmp_path, deep.parent):
        with pytest.raises(CheckpointError, match=f"is a folder; give one of its files, such as {deep}"):
            describe(str(folder))
    for name in ("config.yaml", "ledger.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=f"is the folder of a run; .* rwkv-es export {tmp_path}"):
        describe(str(tmp_path))


def doubled(depth):
    key = ("a",)
    for _ in range(depth):
        key = (key, key)
    return key


def refused(path, words):
    start = time.process_time()
    for read in (load, lambda path: describe(str(path))):
        with pytest.raises(CheckpointError, match=words) as error:
            read(path)
        assert len(str(error.value)) < 600
    assert time.process_time() - start < 5, "before it takes long"


@pytest.mark.parametrize("is_zip", [True, False])
def test_keys_that_are_no_texts_are_refused_before_they_are_hashed(tmp_path, is_zip):
    with open(tmp_path / "m.pth", "wb") as file:
        torch.save({"deep": 1}, file, _use_new_zipfile_serialization=is_zip)
    data = pickle.dumps({}, 2)[:-1] + pickle.dumps(doubled(40), 2)[2:-1] + b"K\x01s."  # {key: 1}, never built here
    repack(tmp_path / "m.pth", data, is_zip)
    refused(tmp_path / "m.pth", "by something else than texts")


ORDERED = b"ccollections\nOrderedDict\n"
STORED = b"}X\x01\x00\x00\x00a(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
DEEP = pickle.dumps(doubled(40), 2)[2:-1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (ORDERED + b"]](" + DEEP + b"K\x01ea\x85R", "dictionary of something else"),  # OrderedDict([[key, 1]])
        (ORDERED + b"q\xf0]](" + DEEP + b"K\x01ea\x85R", "dictionary of something else"),
        (ORDERED + b")R" + DEEP + b"K\x01s", "by something else than texts"),
        (STORED + DEEP + b"X\x03\x00\x00\x00cpuK\x01tQs", "a storage"),
        (b"\x8f(" + DEEP + b"\x90", "sets"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_else_that_hashes_tuples_gets_through(tmp_path, data, words, is_zip):
    repack(tmp_path / "m.pth", b"\x80\x02" + data + b".", is_zip)
    refused(tmp_path / "m.pth", words)


def repack(path, data, is_zip):
    """Replace what describes the tensors."""
    if not is_zip:
        with path.open("wb") as file:
            for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(part, file, 2)
            file.write(data)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/version", "3")


def test_a_description_of_any_size_or_length_is_refused(tmp_path):
    for data in (pickle.dumps({"x" * (9 << 20): 1}, 2), b"\x80\x02}" + b"K\x01" + b"\x85" * 3_000_000 + b"0."):
        repack(tmp_path / "m.pth", data, True)
        refused(tmp_path / "m.pth", "is refused: what describes its tensors")


def test_compressed_archives_and_entries_of_one_name_are_refused(tmp_path, params):
    save(tmp_path / "m.pth", params)
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as source,
        zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    refused(tmp_path / "c.pth", "packed again with compression")
    with zipfile.ZipFile(tmp_path / "m.pth", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"again")
    refused(tmp_path / "m.pth", "of one name|of the same name")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path, params):
    wide = {**params, "emb.weight": torch.zeros(1, 64).expand(32, 64)}
    torch.save(wide, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"emb\.weight claims more values than the file holds"):
        load(tmp_path / "m.pth")
    shared = torch.zeros(64, 64)
    many = {f"w{i}": shared for i in range(50)}
    torch.save(many, tmp_path / "n.pth")
    with pytest.raises(CheckpointError, match="claims more values"):
        load(tmp_path / "n.pth")
