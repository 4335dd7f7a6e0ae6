"""Which tokenizer is a model's: the one that is named, or the one beside it, or RWKV World by its size."""

import sys
from functools import cache
from pathlib import Path

from rwkv_es.config.options import model_name
from rwkv_es.model.vocabulary import END_ID as END_ID  # noqa: PLC0414 - callers know them by this module
from rwkv_es.model.vocabulary import WORLD, JsonTokenizer, Tokenizer, WorldTokenizer, world_lines
from rwkv_es.pretrained.header import read_header
from rwkv_es.system.errors import CheckpointError, ConfigError
from rwkv_es.system.texts import read_text

WORLD_HEAD = 65536


def load_tokenizer(spec: str, model_path: Path, n_vocab: int) -> Tokenizer:
    """Load the tokenizer that `spec` names: "world", a JSON file, or "auto": beside the model, else World by size.

    Raises:
        ConfigError: none is found, it cannot be read, or it has more ids than the model (n_vocab).
    """
    if spec == "auto":
        return _beside(model_path, n_vocab)
    tokenizer: Tokenizer = _world() if spec == "world" else JsonTokenizer(Path(spec))
    _check_size(tokenizer, spec, n_vocab)
    return tokenizer


def _beside(model_path: Path, n_vocab: int) -> Tokenizer:
    """Return the tokenizer that lies beside a model, or World for a model of its size.

    One under the model's own name is trusted. A bare tokenizer.json may belong to another model of the folder: it has
    to fit the model's head.
    """
    own, bare = _names(model_path)
    says_world = _says_world(model_path)
    if says_world or own.is_file():
        tokenizer: Tokenizer = _world() if says_world else JsonTokenizer(own)
        _check_size(tokenizer, "world" if says_world else str(own), n_vocab)
        return tokenizer
    found = JsonTokenizer(bare) if bare.is_file() else None
    if found is not None and _fits(found.n_vocab, n_vocab):
        return found
    if n_vocab == WORLD_HEAD:
        if found is not None:
            print(
                f"rwkv-es: note: {bare} has {found.n_vocab} ids and does not fit the model's {n_vocab}, so World is "
                "taken; --tokenizer names another one",
                file=sys.stderr,
            )
        return _world()
    if found is not None:
        raise ConfigError(
            f"{bare} has {found.n_vocab} ids, but the model {n_vocab}: it seems to belong to another model; name the "
            "right one with --tokenizer"
        )
    raise ConfigError(
        f"no tokenizer for a vocabulary of {n_vocab}: put {own.name} beside the model, or name one with --tokenizer"
    )


def json_beside(model_path: Path) -> Path | None:
    """Return the JSON beside a model that is the model's: under its name, or a bare one that fits its head."""
    own, bare = _names(model_path)
    if _says_world(model_path):
        return None
    if own.is_file() or not bare.is_file():
        return own if own.is_file() else None
    try:
        return bare if _fits(JsonTokenizer(bare).n_vocab, read_header(model_path).arch.n_vocab) else None
    except (ConfigError, CheckpointError):  # the base is gone, or one cannot be read: who loads them says so
        return bare


def _names(model_path: Path) -> tuple[Path, Path]:
    folder = model_path if model_path.is_dir() else model_path.parent
    return folder / f"{model_name(model_path)}.tokenizer.json", folder / "tokenizer.json"


def _says_world(model_path: Path) -> bool:
    """Say whether a Hugging Face directory comes with the World vocabulary.

    Raises:
        ConfigError: it comes with another one of this name.
    """
    file = model_path / WORLD
    if not file.is_file():
        return False
    if read_text(file, "vocabulary").splitlines() != world_lines():
        raise ConfigError(f"{file} is not the vocabulary of RWKV World; name a tokenizer with --tokenizer")
    return True


def _fits(num_ids: int, n_vocab: int) -> bool:
    """Say whether a model's head is as large as a vocabulary, or that rounded up to a multiple of at most 128."""
    return any(-(-num_ids // multiple) * multiple == n_vocab for multiple in (1, 8, 16, 32, 64, 128))


def _check_size(tokenizer: Tokenizer, name: str, n_vocab: int) -> None:
    """Refuse a vocabulary that is larger than the model's; say where it is much smaller.

    Raises:
        ConfigError: it is larger.
    """
    if tokenizer.n_vocab > n_vocab:
        raise ConfigError(
            f"tokenizer {name} has {tokenizer.n_vocab} ids, but the model only {n_vocab}; it belongs to another model"
        )
    if not _fits(tokenizer.n_vocab, n_vocab):
        print(
            f"rwkv-es: note: tokenizer {name} has {tokenizer.n_vocab} ids, the model {n_vocab}; the others are never "
            "used",
            file=sys.stderr,
        )


@cache
def _world() -> WorldTokenizer:
    return WorldTokenizer()
