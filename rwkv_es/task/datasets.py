"""Rows of data sets: JSONL and parquet files, sets of the Hugging Face hub; and what may never be trained on."""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from rwkv_es.system.errors import TaskError
from rwkv_es.task.held_out import HELD_OUT_YEARS, says_held_out, texts_of
from rwkv_es.task.task import Problem, tasks_folder

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
LONGEST_LINE, LARGEST_FILE = 64 << 20, 8 << 30  # bytes of a data file, unpacked
QUESTION_FIELDS = ("prompt", "question", "problem")

Row = Mapping[str, Any]


def read_problems(data: str, split: str, fields: Mapping[str, type], make: Callable[[Row], Problem]) -> list[Problem]:
    """Read a file (for every split), or those of the split in a folder (see `data_files`).

    `make` turns a row, which has all `fields` in their types, into a problem; its ValueError names the line.

    Raises:
        TaskError: unreadable, no problems, a bad line, or a problem that must not be trained on.
    """
    return [_to_problem(where, row, fields, make) for where, row in read_rows(data, split)]


def read_rows(data: str, split: str) -> Iterator[tuple[str, Row]]:
    """Yield where each row stands, for messages, and the row; of the train split with a look at what it may hold.

    Raises:
        TaskError: unreadable, no rows, not an object, or a problem that must not be trained on.
    """
    for file in data_files(data, split):
        for where, row in _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file):
            if split == "train":
                refuse_held_out(where, row)
            yield where, row


def fetch_rows(name: str, config: str, split: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a set of the Hugging Face hub, named as in `read_rows`.

    Raises:
        TaskError: `datasets` is not installed, or it cannot fetch the set.
    """
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"{name} needs its data: pass --data with a folder of train.jsonl and test.jsonl, "
            "or install the extra that fetches it: pip install rwkv-es[tasks]"
        ) from None
    try:
        rows = datasets.load_dataset(name, *([config] if config else []), split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{name} cannot be fetched ({reason}); pass --data with a local copy instead") from None
    for index, row in enumerate(rows, 1):
        where = f"{name}, {split} row {index}"
        if split == "train":
            refuse_held_out(where, row)
        yield where, row


def refuse_held_out(where: str, row: Row) -> None:
    """Refuse to train on a problem of AIME 2024 or 2025, known by a text in the row or by what it says of itself.

    Raises:
        TaskError: it is one.
    """
    for text in {text for _, text in texts_of(row)}:
        if (key := aime_keys().get(question_hash(text))) is not None:
            raise TaskError(f"{where} is {key['id']}, which is held out for evaluation; leave it out of training data")
    if says_held_out(row):
        years = " and ".join(map(str, HELD_OUT_YEARS))
        raise TaskError(f"{where} says that it is of AIME {years}, held out for evaluation; leave it out")


@lru_cache(maxsize=1)
def aime_keys() -> Mapping[str, Row]:
    """Return the answer keys of AIME 2024 and 2025: hash of the question -> id and answer. No texts."""
    lines = (tasks_folder() / "aime" / "keys.jsonl").read_text("utf-8").split("\n")
    return {row["question_sha256_nows"]: row for row in map(json.loads, filter(None, lines))}


def question_hash(question: str) -> str:
    """Return the sha256 of a question without its white space; of one of AIME 2024 and 2025, the hash in its key.

    These are told in the spellings of all the usual sources, and where they stand in a longer text.
    """
    own = hashlib.sha256("".join(question.split()).encode("utf-8", "surrogatepass")).hexdigest()
    return own if own in aime_keys() else _fingerprints().find(question) or own


@lru_cache(maxsize=1)
def _fingerprints() -> Any:
    from rwkv_es.task.fingerprints import Fingerprints  # numpy is loaded when there are rows to look at

    return Fingerprints({name: key.get("fingerprints", ()) for name, key in aime_keys().items()})


def data_files(data: str, split: str) -> list[Path]:
    """Return the files with a split's rows: the file itself, or of a folder {split}.jsonl, .jsonl.gz or .parquet.

    Else its shards in the order of their names, as data sets come from the hub: {split}-*.parquet in the folder or in
    its folder data, or any in a folder {split}.

    Raises:
        TaskError: there are none.
    """
    path = Path(data).expanduser()
    if os.path.isfile(path):
        return [path]
    for pattern in (f"{split}", f"{split}-*", f"data/{split}-*", f"{split}/*"):
        for suffix in SUFFIXES:
            if found := sorted(file for file in path.glob(f"{pattern}{suffix}") if file.is_file()):
                return found
    names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    wanted = f"has none of {names}, nor shards like {split}-*.parquet" if os.path.isdir(path) else "does not exist"
    raise TaskError(f"the data path {data} {wanted}; give a JSONL file or a folder with one for each split")


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


def _to_problem(where: str, row: Row, fields: Mapping[str, type], make: Callable[[Row], Problem]) -> Problem:
    for name, kind in fields.items():
        if row.get(name) is None:
            raise TaskError(f"{where} has no field {name!r}; it needs {', '.join(fields)}")
        if not isinstance(row[name], kind):
            raise TaskError(f"{where}: field {name!r} must be {kind.__name__}; got {type(row[name]).__name__}")
    try:
        return make(row)
    except ValueError as error:
        raise TaskError(f"{where}: {error}") from None
