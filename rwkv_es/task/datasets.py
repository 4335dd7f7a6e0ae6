"""Rows of data sets: files, folders, sets of the Hugging Face hub; their splits; and what may never be trained on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_es.system.errors import TaskError
from rwkv_es.system.hub import HUB
from rwkv_es.system.rows import SUFFIXES, Row, rows_of_file
from rwkv_es.task.division import side_of
from rwkv_es.task.held_out import HELD_OUT_YEARS, says_held_out, texts_of
from rwkv_es.task.task import Problem, tasks_folder

HELD_OUT_SPLITS = ("test", "validation")  # the first that is there
QUESTION_FIELDS = ("prompt", "question", "problem")


class Rows(NamedTuple):
    """Rows, each with where it stands, for messages."""

    each: Iterator[tuple[str, Row]]
    is_whole: bool = False  # of data that have no splits


def read_problems(
    data: str, split: str, fields: Mapping[str, type], make: Callable[[Row], Problem], *, is_divided: bool = True
) -> Sequence[Problem]:
    """Read the problems of a split, see `problems_of`.

    `make` turns a row, which has all `fields` in their types, into a problem; its ValueError names the line. Data
    without splits are read for every split alike if they are not to be divided.

    Raises:
        TaskError: unreadable, no problems, a bad line, or a problem that must not be trained on.
    """

    def checked(where: str, row: Row) -> Problem:
        return _to_problem(where, row, fields, make)

    return problems_of(data, split, checked, is_divided=is_divided)


def problems_of(
    data: str, split: str, make: Callable[[str, Row], Problem], *, is_divided: bool = True
) -> Sequence[Problem]:
    """Make the problems of a split of a file, a folder or `hf:owner/name[:config]`.

    Without splits of their own (one file, a set with `train` alone), they are divided by `side_of`.

    Raises:
        TaskError: unreadable, no rows, not an object, or a problem that must not be trained on.
    """
    rows = _rows_of_hub(data, split) if data.startswith(HUB) else _rows_of_files(data, split)
    found = [make(where, row) for where, row in rows.each]
    return side_of(found, split, data) if rows.is_whole and is_divided else found


def read_rows(data: str, split: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a split's files, or of all of them if they have none; each with where it stands.

    Raises:
        TaskError: unreadable, no rows, not an object, or a problem that must not be trained on.
    """
    return _rows_of_files(data, split).each


def fetch_rows(name: str, config: str, split: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a split of a set of the Hugging Face hub, named as in `read_rows`.

    Raises:
        TaskError: `datasets` is not installed, or it cannot fetch the set.
    """
    return _looked_through(split, _numbered(f"{name}, {split}", _fetched(name, config, split=split)))


def _rows_of_files(data: str, split: str) -> Rows:
    files, is_whole = data_files(data, split)
    return Rows(_looked_through(split, (named for file in files for named in rows_of_file(file))), is_whole)


def _rows_of_hub(data: str, split: str) -> Rows:
    name, _, config = data.removeprefix(HUB).partition(":")
    splits = _fetched(name, config)
    chosen, is_whole = _chosen(list(splits), split)
    if chosen is None:
        raise TaskError(f"{name} has no split {split}, only {', '.join(splits)}; pass --data with a local copy instead")
    return Rows(_looked_through(split, _numbered(f"{name}, {chosen}", splits[chosen])), is_whole)


def _fetched(name: str, config: str, **named: str) -> Any:
    if not name.strip():
        raise TaskError("hf: needs the name of a data set of the hub: hf:owner/name, or hf:owner/name:config")
    try:
        from datasets import load_dataset  # of the library: a folder of data that is called so has none
    except ImportError:
        raise TaskError(
            f"{name} needs its data: pass --data with a folder of train.jsonl and test.jsonl, "
            "or install the extra that fetches it: pip install rwkv-es[tasks]"
        ) from None
    try:
        return load_dataset(name, *([config] if config else []), **named)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TaskError(f"{name} cannot be fetched ({reason}); pass --data with a local copy instead") from None


def _numbered(name: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{name} row {index}", row) for index, row in enumerate(rows, 1))


def _chosen(names: Sequence[str], split: str) -> tuple[str | None, bool]:
    """Choose which of some named splits to read, and say whether it stands for both sides."""
    held_out = next((name for name in HELD_OUT_SPLITS if name in names), None)
    if split == "test" and held_out:
        return held_out, False
    train = "train" if "train" in names else None if held_out or len(names) != 1 else names[0]
    return train, held_out is None


def _looked_through(split: str, rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    for where, row in rows:
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


def data_files(data: str, split: str) -> tuple[list[Path], bool]:
    """Return the files with a split's rows, and whether they stand for both splits.

    Of a folder these are {split}.jsonl, .parquet, ..., else its shards in the order of their names, as data sets come
    from the hub: {split}-*.parquet in the folder or in its folder data, or any in a folder {split}; `validation` is
    as good as `test`. A file, a folder with `train` alone, and one whose files are named otherwise, stand for both;
    a file with a name like test.jsonl is read for every split.

    Raises:
        TaskError: there are none.
    """
    path = Path(data).expanduser()
    if os.path.isfile(path):
        return [path], not path.name.startswith(HELD_OUT_SPLITS)
    held_out = next(filter(None, (_files_named(path, name) for name in HELD_OUT_SPLITS)), [])
    if held_out:
        found, is_whole = held_out if split == "test" else _files_named(path, "train"), False
    else:
        found, is_whole = _files_named(path, "train") or _matching(path, ("*", "data/*")), True
    if found:
        return found, is_whole
    names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    wanted = f"has none of {names}, nor shards like {split}-*.parquet" if os.path.isdir(path) else "does not exist"
    raise TaskError(f"the data path {data} {wanted}; give a JSONL file or a folder with one for each split")


def _files_named(path: Path, name: str) -> list[Path]:
    return _matching(path, (name, f"{name}-*", f"data/{name}-*", f"{name}/*"))


def _matching(path: Path, patterns: Sequence[str]) -> list[Path]:
    """Return a folder's files of the first pattern and kind that are there, in the order of their names."""
    for pattern in patterns:
        for suffix in SUFFIXES:
            if found := sorted(file for file in path.glob(f"{pattern}{suffix}") if file.is_file()):
                return found
    return []


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
