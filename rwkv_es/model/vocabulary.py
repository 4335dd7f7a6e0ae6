"""Text to token ids and back: RWKV World, or any Hugging Face `tokenizers` JSON; and where a completion stops."""

import importlib.util
import unicodedata
from ast import literal_eval
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import read_text, without_surrogates

END_ID = 0  # end of document, in World as in every vocabulary that is accepted here
WORLD = "rwkv_vocab_v20230424.txt"  # the vocabulary's file, in the rwkv package and in Hugging Face directories
WORLD_SIZE = 65530  # ids 0..65529; a World model's head has 65536 outputs, the last ones mean nothing
_PREFIX = 4  # bytes after which World looks up how long the tokens are that begin so: most are that long or shorter
_SHORTER = tuple(range(_PREFIX - 1, 0, -1))


class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    n_vocab: int  # ids below it may be sampled
    end_id: int

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each id; empty for the end token."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text up to the end token; bytes that are no UTF-8 become U+FFFD."""

    def __hash__(self) -> int:
        """What a tokenizer has said may be kept beside it."""


class WorldTokenizer:
    """RWKV World: greedy longest match on bytes, with the vocabulary of the `rwkv` package."""

    n_vocab, end_id = WORLD_SIZE, END_ID

    def __init__(self) -> None:
        self._ids = _read_world()
        found: dict[bytes, set[int]] = {}
        for token in self._ids:
            if len(token) >= _PREFIX:
                found.setdefault(token[:_PREFIX], set()).add(len(token))
        self._lengths = {start: (*sorted(lengths, reverse=True), *_SHORTER) for start, lengths in found.items()}

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; empty for the end token."""
        tokens = {i: token for token, i in self._ids.items()}
        return [tokens.get(i, b"") for i in range(WORLD_SIZE)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; a lone surrogate is read as U+FFFD."""
        data = without_surrogates(text).encode()
        ids, place = [], 0
        while place < len(data):
            for length in self._lengths.get(data[place : place + _PREFIX], _SHORTER):
                token = data[place : place + length]
                if token in self._ids:
                    break
            ids.append(self._ids[token])  # every byte is a token
            place += len(token)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text up to the end token; bytes that are no UTF-8 become U+FFFD."""
        return _join(self.token_bytes, ids)


class JsonTokenizer:
    """A Hugging Face `tokenizers` JSON: Pile models and small vocabularies of one's own."""

    end_id = END_ID

    def __init__(self, path: Path) -> None:
        self._path, self._tokenizer = path, _read_json(path)
        self._tokenizer.encode_special_tokens = True  # a prompt that spells "<|endoftext|>" does not end the document
        self.n_vocab = 1 + max(self._tokenizer.get_vocab().values(), default=0)
        self._is_byte_level = "ByteLevel" in str(self._tokenizer.decoder or "")
        end = self._tokenizer.id_to_token(END_ID)
        if end not in {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}:
            raise ConfigError(f"{path}: id 0 must be a special token that ends a document; it is {end!r}")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; empty for the end token."""
        tokens = [self._tokenizer.id_to_token(i) or "" for i in range(self.n_vocab)]
        plain = range(self.n_vocab) if not self._is_byte_level else self._tokenizer.get_added_tokens_decoder()
        tokens[END_ID] = ""
        return [token.encode() if i in plain else _from_byte_level(token) for i, token in enumerate(tokens)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; a lone surrogate is read as U+FFFD.

        Raises:
            ConfigError: the vocabulary cannot express it, or the JSON asks for changes to it.
        """
        plain = without_surrogates(text)
        try:
            ids = list(self._tokenizer.encode(plain, add_special_tokens=False).ids)
        except Exception:  # noqa: BLE001 - the library raises bare Exception for a word that it does not have
            ids = []
        read = self.decode(ids)
        if not _is_same_text(read, plain):
            raise self._refusal(plain, read)
        return ids

    def _refusal(self, text: str, read: str) -> ConfigError:
        if not self._is_byte_level:
            return ConfigError(
                f"the model's vocabulary cannot express {text[:60]!r}; see `rwkv-es tasks` for what fits it"
            )
        place = next((i for i, character in enumerate(text) if read[i : i + 1] != character), 0)
        before, after = (one[max(place - 20, 0) : place + 20] for one in (text, read))
        return ConfigError(
            f"tokenizer {self._path} turns {before!r} into {after!r}; take a tokenizer that keeps every character: "
            "no normalizer but NFC, no prefix space, a vocabulary of all 256 bytes"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text up to the end token; bytes that are no UTF-8 become U+FFFD."""
        return _join(self.token_bytes, ids)


def _read_world() -> dict[bytes, int]:
    """Read the vocabulary: lines of an id, a Python literal and its length in bytes.

    The package's own tokenizer holds 300 MB in a trie of lists.
    """
    lines = world_lines()
    literals = ((line[: line.index(" ")], line[line.index(" ") : line.rindex(" ")].strip()) for line in lines)
    return {_from_literal(literal): int(i) for i, literal in literals}


def world_file() -> Path:
    """Return the vocabulary's file in the rwkv package."""
    spec = importlib.util.find_spec("rwkv")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name(WORLD)


def world_lines() -> list[str]:
    """Return the lines of the World vocabulary: an id, a Python literal and its length in bytes."""
    return world_file().read_text(encoding="utf-8").splitlines()


def _from_literal(literal: str) -> bytes:
    if literal[0] in "'\"" and "\\" not in literal:
        return literal[1:-1].encode()  # nearly all are so plain, and Python's own reading takes half a second
    token = literal_eval(literal)
    return token.encode() if isinstance(token, str) else token


def _join(token_bytes: Sequence[bytes], ids: Sequence[int]) -> str:
    until_end = list(ids)
    if END_ID in until_end:
        del until_end[until_end.index(END_ID) :]
    return b"".join(map(token_bytes.__getitem__, until_end)).decode("utf-8", "replace")


def _read_json(path: Path) -> Any:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    if not path.is_file():
        raise ConfigError(f'tokenizer {path} does not exist; give a tokenizers JSON file, "world" or "auto"')
    text = read_text(path, "tokenizer")
    try:
        tokenizer = HuggingFaceTokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise ConfigError(f"tokenizer {path} cannot be read ({str(error).splitlines()[0][:200]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None  # it would draw another spelling at every call
    return tokenizer


def _is_same_text(a: str, b: str) -> bool:
    """Say whether texts differ at most in how accents are composed: Pile models were trained on composed ones (NFC)."""
    return a == b or unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def _from_byte_level(token: str) -> bytes:
    """Undo GPT-2's spelling of bytes as printable characters; what has other characters is spelled as it is."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _byte_of() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(others)}}


_BYTE_OF = _byte_of()
