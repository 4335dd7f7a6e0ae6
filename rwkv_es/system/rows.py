"""Rows of a file: JSONL, JSON, CSV, TSV or parquet."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import TaskError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv", ".tsv")
LONGEST_LINE, LARGEST_FILE = 64 << 20, 8 << 30  # bytes of a data file, unpacked

Row = Mapping[str, Any]


def rows_of_file(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield where each row stands, for messages, and the row. A name of no known kind is read as JSONL.

    Raises:
        TaskError: unreadable, no rows, or something in it is none.
    """
    kinds = {".parquet": _parquet_rows, ".json": _array_rows, ".csv": _csv_rows, ".tsv": _csv_rows}
    return kinds.get(file.suffix.lower(), _json_rows)(file)


def _array_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield the entries of a JSON array; what is none is read as JSONL."""
    try:
        with file.open("rb") as raw:
            is_array = raw.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        rows = json.loads(_text_of(file)) if is_array else None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{file} is not JSON: {str(error)[:200]}") from None
    except OSError as error:
        raise TaskError(f"the data file {file} cannot be read: {error}") from None
    if rows is None:
        yield from _json_rows(file)
        return
    if not rows:
        raise TaskError(f"the data file {file} holds no problems")
    for where, row in ((f"{file}, entry {i}", row) for i, row in enumerate(rows, 1)):
        if not isinstance(row, dict):
            raise TaskError(f"{where} must be a JSON object; got {type(row).__name__}")
        yield where, row


def _csv_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield rows of texts, by the names in the first line; an empty cell is as good as absent."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        reader = csv.DictReader(io.StringIO(_text_of(file), newline=""), delimiter=delimiter, strict=True)
        rows = [(f"{file}, line {reader.line_num}", row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"the data file {file} cannot be read: {error}") from None
    if not rows:
        raise TaskError(f"the data file {file} holds no problems; its first line names the columns")
    for where, row in rows:
        if None in row:
            raise TaskError(f"{where} has more cells than the first line has names; quote cells that hold commas")
        yield where, {name: cell or None for name, cell in row.items()}


def _text_of(file: Path) -> str:
    """Return a file's text.

    Raises:
        OSError, UnicodeDecodeError: it is too large, or none.
    """
    if file.stat().st_size > LARGEST_FILE:
        raise OSError(f"more than {LARGEST_FILE:,} bytes")
    return file.read_text(encoding="utf-8-sig")


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    open_file: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with open_file(file, "rb") as lines:  # of bytes: they end at b"\n" alone, never at U+2028
            numbered = [(f"{file}, line {i}", line) for i, line in enumerate(_bounded(lines), 1) if line.strip()]
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise TaskError(f"the data file {file} cannot be read: {error}") from None
    if not numbered:
        raise TaskError(f"the data file {file} holds no problems; it needs one JSON object a line")
    for where, line in numbered:
        try:
            row = json.loads(line)
        except RecursionError:
            raise TaskError(f"{where} is nested too deep") from None
        except ValueError as error:
            raise TaskError(f"{where} is not JSON: {str(error)[:200]}") from None
        if not isinstance(row, dict):
            raise TaskError(f"{where} must be a JSON object; got {type(row).__name__}")
        yield where, row


def _bounded(lines: Any) -> Iterator[bytes]:
    """Yield a file's lines, as long as it is a file of problems and no bomb.

    Raises:
        OSError: a line, or all of them, have more bytes than any problems have.
    """
    total = 0
    while line := lines.readline(LONGEST_LINE + 1):
        total += len(line)
        if len(line) > LONGEST_LINE or total > LARGEST_FILE:
            raise OSError(f"more than {LONGEST_LINE:,} bytes in a line or {LARGEST_FILE:,} in all")
        yield line


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise TaskError(f"{file} needs an extra to be read: pip install rwkv-es[tasks]") from None
    try:
        table = parquet.read_table(file)
        rows = table.to_pylist()
    except (OSError, ArrowException) as error:
        raise TaskError(f"the data file {file} cannot be read: {error}") from None
    if not rows:
        raise TaskError(f"the data file {file} holds no problems")
    import numpy as np

    for name in (field.name for field in table.schema if str(field.type) in ("float", "halffloat")):
        kind = np.float32 if str(table.schema.field(name).type) == "float" else np.float16
        for row in rows:  # 0.1, not 0.10000000149011612
            row[name] = row[name] if row[name] is None else float(str(kind(row[name])))
    yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows, 1))
