"""Weights written as Hugging Face directories: like one that is there, or as the package rwkv7-hf converts them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from rwkv_es.model.layout import Params
from rwkv_es.model.vocabulary import END_ID, world_file
from rwkv_es.pretrained import checkpoint
from rwkv_es.pretrained.huggingface import Official, official, weight_files
from rwkv_es.pretrained.tokenizer import WORLD_HEAD
from rwkv_es.system.errors import ConfigError

_BELONGING = (".json", ".txt", ".py", ".jinja", ".model")  # ends of a directory's files besides its weights
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def write_like(base: Path, weights: Params, place: Path) -> None:
    """Write weights of the official layout as the files of another directory: its names, shapes and shards."""
    from safetensors import safe_open

    files = weight_files(base)
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        stored = {name: _stored(weights, official(name), shape) for name, shape in shapes.items()}
        checkpoint.write_safetensors(stored, place / file.name, metadata)
    for path in base.iterdir():
        if path.is_file() and path not in files and (path.suffix in _BELONGING or path.name.startswith("LICENSE")):
            shutil.copyfile(path, place / path.name)


def _stored(weights: Params, place: Official, shape: tuple[int, ...]) -> Tensor:
    tensor = weights[place.name]
    return (tensor.mT if place.is_transposed else tensor).reshape(shape).contiguous()


def convert(weights: Params, place: Path) -> None:
    """Convert weights of the official layout by rwkv7-hf, in a process of its own: it needs transformers.

    Raises:
        ConfigError: it is not installed, or fails.
    """
    if not all(map(importlib.util.find_spec, ("rwkv7_hf", "transformers"))):
        raise ConfigError("a Hugging Face directory needs an extra to be written: pip install rwkv-es[hf]")
    source = place / "official.pth"
    checkpoint.save(source, weights)
    command = [sys.executable, "-m", "rwkv7_hf.cli", "convert", "--input", str(source), "--output", str(place)]
    command += ["--precision", _PRECISIONS[weights["emb.weight"].dtype], "--low-memory", "--max-shard-size", "5GB"]
    command += ["--vocab-file", str(world_file())] if len(weights["emb.weight"]) == WORLD_HEAD else []
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    source.unlink()
    if done.returncode:
        reason = (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
        raise ConfigError(f"rwkv7-hf cannot convert these weights ({reason[:200]})")
    for path in place.iterdir():
        shutil.copymode(place / "config.json", path)  # shards come readable by their owner alone


def take_tokenizer(tokenizer: Path, place: Path) -> None:
    """Copy a tokenizers JSON into a directory, and tell transformers to read it."""
    shutil.copyfile(tokenizer, place / "tokenizer.json")
    tokens = json.loads(tokenizer.read_bytes())["added_tokens"]
    end = next(token["content"] for token in tokens if token["id"] == END_ID)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": end}
    (place / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("special_tokens_map.json", "tokenization_rwkv7.py"):  # of World
        (place / name).unlink(missing_ok=True)
