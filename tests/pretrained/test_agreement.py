"""Exported models loaded by other programs: the rwkv package, and transformers with the code that rwkv7-hf writes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import random_params
from directories import UNUSED

from rwkv_es.config.options import Config, to_dict
from rwkv_es.es.strategy import Step
from rwkv_es.es.update import checksum
from rwkv_es.model.forward import Model
from rwkv_es.pretrained.checkpoint import load, save
from rwkv_es.pretrained.tokenizer import load_tokenizer
from rwkv_es.run.ledger import Ledger
from rwkv_es.verbs.export import export

MOST = 2e-5  # of logits with a spread of about 1, in fp32: other kernels add in another order
TEXT = "User: What is 12 times 12?\n\nAssistant: <think>Ёжик 🦆 日本語"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
needs_hf = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("rwkv7_hf", "transformers"))),
    reason="needs the extra hf: pip install rwkv-es[hf]",
)
RWKV = """
import os; os.environ["RWKV_V7_ON"] = "1"
from rwkv.model import RWKV_x070
model = RWKV_x070(model=path.removesuffix(".pth"), strategy="cpu fp32")
logits = model.forward(ids, None)[0]
"""
TRANSFORMERS = """
import os; os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
assert tokenizer(text)["input_ids"] == ids, tokenizer(text)
logits = model(torch.tensor([ids])).logits[0, -1]
"""


def ask(client, path, ids):
    """Return a program's logits after some tokens, from a process of its own."""
    ending = "\nprint(json.dumps(logits.float().tolist()))"
    start = f"import json, torch; torch.set_grad_enabled(False); torch.set_num_threads(1)\npath = {str(path)!r}\n"
    given = f"ids = {ids}\ntext = {TEXT!r}\n"
    code = start + given + client + ending
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module", params=DTYPES)
def run(request, tmp_path_factory):
    """A run of one step, from a base with the World vocabulary in a dtype; the weights are fp32."""
    folder = tmp_path_factory.mktemp(request.param)
    base = folder / "rwkv7-g1j-0.1b-20260831-ctx4096.pth"
    params = random_params(4, 128, 65536, seed=1)
    save(base, {name: tensor.to(DTYPES[request.param]) for name, tensor in params.items()})
    tuned = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=_generator()) for name, tensor in params.items()}
    with Ledger.open(folder / "run", to_dict(Config()), base) as ledger:
        ledger.append(Step(0, [[1.0]], [0.0], 0.1, 0.1, 1, 0.1, checksum(tuned)))
        ledger.save_snapshot(1, tuned, {}, 0.5)
    return folder / "run"


def _generator():
    return torch.Generator().manual_seed(2)


def ours(path):
    params, arch = load(path)
    ids = load_tokenizer("auto", Path(path), arch.n_vocab).encode(TEXT)
    return ids, Model({name: tensor.float() for name, tensor in params.items()}, arch).logits(ids)


def compare(what, client, path):
    ids, logits = ours(path)
    difference = (ask(client, path, ids) - logits).abs().max().item()
    print(f"{what}: logits of {len(ids)} tokens differ by at most {difference:.1e}, their spread is {logits.std():.2f}")
    assert difference <= MOST
    return logits


def test_the_rwkv_package_reads_an_export(run):
    compare(f"rwkv, {run.parent.name[:4]}", RWKV, export(Config(run=str(run))))


@needs_hf
def test_transformers_reads_an_exported_directory_that_is_the_exported_file(run, tmp_path):
    directory = export(Config(run=str(run), format="hf", out=str(tmp_path / "tuned-hf")))
    file = export(Config(run=str(run), out=str(tmp_path / "tuned.pth")))
    found, expected = load(directory)[0], load(file)[0]
    assert found.keys() == expected.keys() - UNUSED
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype, name
    logits = compare(f"transformers and rwkv7-hf, {run.parent.name[:4]}", TRANSFORMERS, directory)
    assert torch.equal(logits, ours(file)[1])
    assert (directory / "model.safetensors").stat().st_mode & 0o777 == (
        directory / "config.json"
    ).stat().st_mode & 0o777
