"""Hugging Face directories: every naming reads as the official layout, and what is broken is said."""

import json
import shutil

import pytest
import torch
from checkpoints import random_params
from directories import UNUSED, fla, linears, prefixed, write_directory
from safetensors.torch import load_file, save_file
from small_runs import run as train_small

from rwkv_es.cli import main
from rwkv_es.config.options import model_name
from rwkv_es.model.vocabulary import JsonTokenizer, WorldTokenizer, world_file
from rwkv_es.pretrained.checkpoint import load, resolve, save, sha256
from rwkv_es.pretrained.header import describe
from rwkv_es.pretrained.tokenizer import json_beside, load_tokenizer
from rwkv_es.system.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def params():
    return random_params(3, 128, 64, dtype=torch.bfloat16)


def is_equal(found, params):
    return found.keys() == params.keys() - UNUSED and all(torch.equal(found[name], params[name]) for name in found)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("naming", [fla, linears, prefixed])
def test_every_naming_is_read_as_the_official_layout(tmp_path, params, naming, num_shards):
    folder = write_directory(tmp_path / "a-7.2b-hf", params, naming, num_shards, norm_eps=1e-5, vocab_size=64)
    found, arch = load(resolve(str(folder)))
    assert is_equal(found, params)
    assert all(tensor.is_contiguous() and tensor.shape == params[name].shape for name, tensor in found.items())
    save(tmp_path / "official.pth", params)
    official = describe(str(tmp_path / "official.pth"))
    assert describe(str(folder)) == official._replace(name="a-7.2b-hf") and arch == official.arch
    assert next(iter(found)) == "emb.weight" and [*found][-1] == "head.weight"


def test_a_directory_is_known_by_its_weights_alone(tmp_path, params):
    first = write_directory(tmp_path / "a", params, num_shards=2)
    second = write_directory(tmp_path / "b", params, num_shards=2, context_length=4096)
    assert sha256(first) == sha256(second)
    shard = second / "model-00002-of-00002.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    save_file(changed, shard)
    assert sha256(first) != sha256(second)


def test_some_tensors_may_be_fp32_beside_shorter_ones_but_none_longer_than_a_float(tmp_path, params):
    mixed = {name: tensor.float() if name.endswith("att.w0") else tensor for name, tensor in params.items()}
    found, _ = load(write_directory(tmp_path / "mixed", mixed))
    assert found["blocks.1.att.w0"].dtype == torch.float32 and is_equal(found, mixed)
    for name, dtype in (("double", torch.float64), ("half", torch.float16)):
        other = {**params, "ln_out.bias": params["ln_out.bias"].to(dtype)}
        with pytest.raises(CheckpointError, match=r"ln_out\.bias is torch\.float"):
            load(write_directory(tmp_path / name, other))


def _index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def _reindex(folder, where):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _misnamed(name):
    def change(folder):
        _reindex(folder, {**_index(folder), "lm_head.weight": name})

    return change


def _cut(folder):
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def _changed(change):
    def rewrite(folder):
        for shard in folder.glob("*.safetensors"):
            save_file({name: change(name, tensor) for name, tensor in load_file(shard).items()}, shard)

    return rewrite


def _twice(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    held = load_file(shard)
    name = next(name for name in held if name.startswith("model.layers.") and "attn" not in name)
    save_file({**held, "model.blocks.0.ln1.bias": torch.ones(128), "rwkv7.blocks.0.ln1.bias": torch.ones(128)}, shard)
    both = dict.fromkeys(("model.blocks.0.ln1.bias", "rwkv7.blocks.0.ln1.bias"), shard.name)
    _reindex(folder, {**_index(folder), **both})
    assert name


def _configured(**values):
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "rwkv7", **values}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_misnamed("../secret.safetensors"), r"names '\.\./secret\.safetensors', which is no file of this directory"),
        (_misnamed("/etc/passwd"), "which is no file of this directory"),
        (_misnamed(".hidden.safetensors"), "which is no file of this directory"),
        (_misnamed(["a"]), "which is no file of this directory"),
        (_misnamed("pickled.bin"), "which is no file of this directory"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors is missing"),
        (lambda f: _reindex(f, {**_index(f), "more": "model-00001-of-00002.safetensors"}), "differ in more"),
        (lambda f: _reindex(f, []), "has no weight_map"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list, not an object"),
        (_cut, "truncated|claims more values|no safetensors"),
        (_changed(lambda n, w: w[1:] if n == "model.layers.1.attn.k_proj.weight" else w), "att.key.weight has shape"),
        (_changed(lambda n, w: w.T.contiguous() if n.endswith("w_lora.lora.0.weight") else w), "shape"),
        (_twice, r"holds blocks\.0\.ln1\.bias twice"),
        (_configured(model_type="llama"), "directory of a 'llama' model"),
        (_configured(norm_eps=1e-6), "has norm_eps 1e-06; rwkv_es computes with 1e-05 only"),
        (_configured(embedding_layer_norm_fused=True), "embedding_layer_norm_fused True"),
        (_configured(quantization_config={"bits": 4}), "quantization_config"),
        (_configured(hidden_size=256), "has hidden_size 256, but the tensors have 128"),
    ],
)
def test_what_is_broken_is_said_before_anything_is_loaded_and_after(tmp_path, params, change, words):
    folder = write_directory(tmp_path / "hf", params, num_shards=2)
    change(folder)
    for read in (load, lambda path: describe(str(path))):
        with pytest.raises(CheckpointError, match=words) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_folders_that_are_no_directory_of_weights_are_told_apart(tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="directory of pickled weights"):
        resolve(str(tmp_path / "pickled"))
    cache = tmp_path / "models--o--name"
    for path in (cache / "refs" / "main", cache / "snapshots" / "0a1b" / "config.json"):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"give the Hugging Face directory in it, such as .*0a1b"):
        resolve(str(cache))
    assert model_name(cache / "snapshots" / "0a1b") == "name"


def test_the_tokenizer_of_a_directory_is_its_own(tmp_path, params):
    world = write_directory(tmp_path / "world", params)
    shutil.copyfile(world_file(), world / world_file().name)
    (world / "tokenizer.json").write_text("no tokenizer at all")
    assert isinstance(load_tokenizer("auto", world, 65536), WorldTokenizer) and json_beside(world) is None
    (world / world_file().name).write_text("1 'a' 1\n")
    with pytest.raises(ConfigError, match="is not the vocabulary of RWKV World"):
        load_tokenizer("auto", world, 65536)
    own = write_directory(tmp_path / "own", load(resolve("tiny"))[0])
    shutil.copyfile(json_beside(resolve("tiny")), own / "tokenizer.json")
    assert isinstance(load_tokenizer("auto", own, 115), JsonTokenizer) and json_beside(own) == own / "tokenizer.json"


def test_a_run_from_a_directory_is_the_run_from_the_file(tmp_path, capsys):
    tiny = resolve("tiny")
    folder = write_directory(tmp_path / "small-hf", load(tiny)[0], linears, 2)
    shutil.copyfile(json_beside(tiny), folder / "tokenizer.json")
    run = train_small(tmp_path / "run", model=str(folder), steps=2)
    train_small(tmp_path / "other", steps=2)
    weights = [load(place / "snapshots" / "step-000002" / "model.pth")[0] for place in (run, tmp_path / "other")]
    assert is_equal(*weights)
    assert main(["resume", str(run)]) == 0
    assert main(["export", str(run), "--weights", "last"]) == 0
    assert load(run / "small-hf.pth")[0].keys() == load(folder)[0].keys()
    assert main(["replay", str(run)]) == 0
    assert main(["plan", str(folder)]) == 0
    assert main(["generate", "1 + 1 =", "--model", str(folder), "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert main(["generate", "1 + 1 =", "--model", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
