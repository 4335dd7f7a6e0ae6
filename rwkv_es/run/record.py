"""A step as a line of the ledger: sealed by a hash of itself and of all lines before, its rewards packed."""

import hashlib
import math
import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rwkv_es.es.step import Step
from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError

_LONGEST_LIST = 1024  # numbers of a step that are written as a list; more are packed
_LARGEST_TABLE = 256


def in_memory(step: Step) -> Step:
    """Return what is kept in memory of a step: its fitness, 8 bytes a member."""
    return step._replace(rewards=[], fitness=array("d", step.fitness))


def packed(values: Sequence[Any]) -> Any:
    """Return numbers, (N,P) with None for missing ones or (N,), as they are written: many as a compressed text."""
    rows = [row if isinstance(row, Sequence) else [row] for row in values]
    if sum(map(len, rows)) <= _LONGEST_LIST:
        return [list(row) if isinstance(row, Sequence) else row for row in values]
    words = np.array([[math.nan if value is None else value for value in row] for row in rows], "<f8").view("<i8")
    table, index = np.unique(words, return_inverse=True)
    if len(table) <= _LARGEST_TABLE:  # a bit plane each: rewards are often but 0 and 1
        planes = [np.packbits(index.ravel() >> bit & 1).tobytes() for bit in range((len(table) - 1).bit_length())]
        data = bytes([len(table) - 1]) + table.tobytes() + b"".join(planes)
    else:
        data = words.view(np.uint8).reshape(-1, 8).T.tobytes()  # like bytes side by side
    kind = "table" if len(table) <= _LARGEST_TABLE else "bytes"
    shape = "x".join(map(str, words.shape if isinstance(values[0], Sequence) else words.shape[:1]))
    return f"{kind} {shape} {b64encode(zlib.compress(data, 9)).decode()}"


def unpacked(written: Any) -> list[Any]:
    """Return the numbers from what is written.

    Raises:
        ValueError: it is no such text.
    """
    if not isinstance(written, str):
        return list(written)
    kind, shape, text = written.split(" ")
    size = math.prod(map(int, shape.split("x")))
    try:
        data = zlib.decompressobj().decompress(b64decode(text, validate=True), 16 * size + 9 * _LARGEST_TABLE)
    except zlib.error as error:
        raise ValueError(f"damaged numbers: {error}") from None
    if kind == "table":
        count = data[0] + 1
        table, bits = np.frombuffer(data[1 : 1 + 8 * count], "<f8"), np.frombuffer(data[1 + 8 * count :], np.uint8)
        index = np.zeros(size, np.int64)
        for bit, plane in enumerate(bits.reshape(-1, -(-size // 8))):
            index |= np.unpackbits(plane, count=size).astype(np.int64) << bit
        values = table[index]
    else:
        values = np.frombuffer(data, np.uint8).reshape(8, size).T.copy().view("<f8")
    found = values.reshape([int(part) for part in shape.split("x")]).tolist()
    return [[None if math.isnan(v) else v for v in row] if isinstance(row, list) else row for row in found]


def sealed(seal_before: str, step: Step) -> dict[str, Any]:
    """Return a step's row with its seal: a hash of the row and of all rows before it."""
    row = {**step._asdict(), "rewards": packed(step.rewards), "fitness": packed(step.fitness)}
    return {**row, "seal": _seal(seal_before, row)}


def chained(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the rows of a whole ledger."""
    rows: list[dict[str, Any]] = []
    for step in steps:
        rows.append(sealed(rows[-1]["seal"] if rows else "", step))
    return rows


class Line(NamedTuple):
    """A step as it was read."""

    step: Step  # its rewards as they are written
    seal: str
    end: int  # of the line in the file, in bytes


def stream(path: Path) -> Iterator[Line]:
    """Read a ledger line by line; a last line that a crash has torn is left out.

    Raises:
        ConfigError: a line is not the one that was written; it is named.
    """
    seal, end = "", 0
    for number, (text, row) in enumerate(files.stream_lines(path)):
        fields = {name: value for name, value in row.items() if name != "seal"}
        if set(fields) != set(Step._fields) or fields["step"] != number:
            raise ConfigError(
                f"{path} line {number + 1} is not step {number}; restore the file, or choose another --run"
            )
        seal, end = _seal(seal, fields), end + len(text)
        if seal != row.get("seal") or files.line(row).encode() != text:
            raise ConfigError(
                f"{path} line {number + 1} (step {number}) is not what was written: its seal is broken; "
                "restore the file, or choose another --run"
            )
        yield Line(Step(**{**fields, "fitness": unpacked(fields["fitness"])}), seal, end)


def read_steps(folder: Path) -> list[Step]:
    """Read a run folder's steps, their rewards as they are written (see `unpacked`); nothing is changed there.

    Raises:
        ConfigError: a line is broken, even the last one, or is not the one that was written.
    """
    path = folder / "ledger.jsonl"
    lines = list(stream(path))
    if path.exists() and path.stat().st_size > (lines[-1].end if lines else 0):
        raise ConfigError(
            f"{path} line {len(lines) + 1} is torn or damaged; rwkv-es train drops it and takes that step again"
        )
    return [line.step for line in lines]


def _seal(seal_before: str, row: Mapping[str, Any]) -> str:
    return hashlib.sha256((seal_before + files.line(row)).encode()).hexdigest()[:16]
