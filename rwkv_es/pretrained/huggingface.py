"""Hugging Face directories of RWKV-7: their files, and their names and shapes in the place of the official ones.

Two namings are about: flash-linear-attention's, which the package rwkv7-hf writes (`model.layers.0.attn.r_proj`), and
the official names behind a prefix (`model.blocks.0.att.receptance`). Low-rank pairs may be stored as Linears: (o,i).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_es.model.layout import HEAD_SIZE, Arch
from rwkv_es.system.errors import CheckpointError
from rwkv_es.system.texts import shown

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 1 << 24  # bytes: an index names a few thousand tensors
_OF_FLA = {
    **{"pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2"},
    **{"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "ln_x"},
}
_TOP_OF_FLA = {"embeddings": "emb", "norm": "ln_out", "lm_head": "head"}
_LORA = re.compile(r"([wavg])_lora\.lora\.(?:0\.(weight)|2\.(weight)|2\.(bias))")
_PAIR = re.compile(r"(blocks\.\d+\.att\.[wavg][12])\.weight")
_VECTOR = re.compile(r"blocks\.\d+\.(?:att\.(?:x_[rwkvag]|w0|a0|v0|k_k|k_a)|ffn\.x_k)")
_CONSTANTS = {  # what a model of the official layout computes with, under the names of both namings
    **dict.fromkeys(("norm_eps", "layer_norm_epsilon", "layer_norm_eps"), 1e-5),
    **{"group_norm_epsilon": 64e-5, "head_dim": HEAD_SIZE, "head_size": HEAD_SIZE},
    **{"tie_word_embeddings": False, "embedding_layer_norm_fused": False, "quantization_config": None},
}
_SIZES = {
    **{"vocab_size": "n_vocab", "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "intermediate_size": "n_ffn"},
    **{"decay_low_rank_dim": "rank_w", "a_low_rank_dim": "rank_a", "gate_low_rank_dim": "rank_g"},
}


class Official(NamedTuple):
    """A tensor of a directory in the official layout."""

    name: str
    is_transposed: bool  # as it is stored, it is (o,i) and not (i,o)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the official shape of a tensor that is stored in another one; of what does not fit, its own."""
        if self.is_transposed:
            return stored[::-1]
        if _VECTOR.fullmatch(self.name) and math.prod(stored) == max(stored, default=0):
            return (1, 1, max(stored))
        return (stored[0] // HEAD_SIZE, HEAD_SIZE) if self.name.endswith("att.r_k") and len(stored) == 1 else stored


def is_directory(path: Path) -> bool:
    """Say whether a folder holds a model as transformers writes it."""
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (WEIGHTS, INDEX))


def official(name: str) -> Official:
    """Return what a directory's tensor is in the official layout; a name that is not known stays."""
    head, _, rest = name.partition(".")
    if head in ("head", "lm_head"):
        return Official(f"head.{rest}", False)
    if head not in ("model", "rwkv7"):
        return Official(name, False)
    if (layer := re.fullmatch(r"layers\.(\d+)\.(.+)", rest)) is None:
        part, _, end = rest.partition(".")
        inner = f"{_TOP_OF_FLA.get(part, part)}.{end}"
        pair = _PAIR.fullmatch(inner)
        return Official(pair[1] if pair else inner, bool(pair))
    block, inner = f"blocks.{layer[1]}.", layer[2].removeprefix("attn.")
    where = "att." if inner != layer[2] else ""
    if lora := _LORA.fullmatch(inner):
        number = next(n for n, group in zip("120", lora.groups()[1:]) if group)
        return Official(f"{block}{where}{lora[1]}{number}", number != "0")
    part, dot, end = inner.partition(".")
    return Official(f"{block}{where}{_OF_FLA.get(part, part)}{dot}{end}", False)


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Return a directory's files of weights, in order, and the tensors that its index says are in each (None: any).

    Raises:
        CheckpointError: the index cannot be read, leads out of the directory, or names a file that is missing.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    where = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download the model again")
    found: dict[Path, list[str] | None] = {}
    names = sorted({name if isinstance(name, str) else repr(name) for name in where.values()})
    for name in names:
        if not re.fullmatch(r"[\w][\w.-]{0,199}\.safetensors", name):
            raise CheckpointError(
                f"{folder / INDEX} names {shown(name)}, which is no file of this directory; remove it"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing; download the model again")
        found[folder / name] = sorted(tensor for tensor, file in where.items() if file == name)
    return found


def in_official_layout(folder: Path, shards: Mapping[Path, Mapping[str, Any]]) -> dict[str, tuple[Path, str, Official]]:
    """Return where each official tensor lies, in the official order: file, name there, what it is.

    Raises:
        CheckpointError: a file holds other tensors than the index says, or two are the same one.
    """
    found: dict[str, tuple[Path, str, Official]] = {}
    for file, listed in weight_files(folder).items():
        names = sorted(shards[file])
        if listed is not None and (other := set(listed) ^ set(names)):
            raise CheckpointError(f"{file} and the index of its directory differ in {min(other)}; download both again")
        for name in names:
            place = official(name)
            if place.name in found:
                raise CheckpointError(f"{folder} holds {place.name} twice, the second time as {name}; remove one")
            found[place.name] = (file, name, place)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def read_config(folder: Path) -> dict[str, Any]:
    """Return a directory's config.json.

    Raises:
        CheckpointError: it cannot be read, or says that the model is another one, or computes with other constants.
    """
    config = _read_json(folder / CONFIG)
    if not str(kind := config.get("model_type", "rwkv7")).startswith("rwkv7"):
        raise CheckpointError(
            f"{folder} is a Hugging Face directory of a {shown(kind)} model; rwkv_es tunes RWKV-7 only"
        )
    for name, wanted in _CONSTANTS.items():
        value = config.get(name)
        if value is not None and value != wanted and not (wanted and _is_near(value, wanted)):
            raise CheckpointError(f"{folder / CONFIG} has {name} {shown(value)}; rwkv_es computes with {wanted} only")
    return config


def check_sizes(folder: Path, arch: Arch) -> None:
    """Compare a directory's config.json with the sizes of its tensors.

    Raises:
        CheckpointError: they differ.
    """
    config = read_config(folder)
    for name, field in _SIZES.items():
        if config.get(name) not in (None, size := getattr(arch, field)):
            raise CheckpointError(
                f"{folder / CONFIG} has {name} {shown(config[name])}, but the tensors have {size}; download both again"
            )


def _order(name: str) -> tuple[int, int, str]:
    """Sort by the place in a model: embedding, blocks, last norm, head."""
    if block := re.match(r"blocks\.(\d{1,9})\.", name):
        return 1, int(block[1]), name
    return {"emb.weight": 0, "head.weight": 3}.get(name, 2), 0, name


def _is_near(value: Any, wanted: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, wanted, rel_tol=1e-6)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} has more than {_LARGEST_JSON:,} bytes, more than any model needs; remove it")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error)[:80]}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object; download it again")
    return content
