"""Text: any UTF-8 file in pieces, to be predicted token by token (--objective logprob)."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rwkv_es.system.errors import TaskError
from rwkv_es.system.texts import expanded, read_text
from rwkv_es.task import Problem
from rwkv_es.task.datasets import refuse_held_out
from rwkv_es.task.division import HELD_OUT_SHARE, hashed

VERSION = "1"
STOP: tuple[str, ...] = ()
MAX_NEW_TOKENS = 256
TEMPLATE = "raw"

CHARACTERS = 1024  # of a piece, where no argument says it
LARGEST = 4 << 30  # bytes


def problems(split: str, data: str = "", argument: str = "") -> Sequence[Problem]:
    """Return the pieces of a file, of which a hash holds out a tenth; or those of a folder's train.txt or test.txt.

    argument: the most characters of a piece.
    """
    if not data:
        raise TaskError("task text needs --data: a text file, or a folder with train.txt and test.txt")
    if argument and not (argument.isascii() and argument.isdecimal() and int(argument)):
        raise TaskError(f"text:N cuts pieces of up to N characters, such as text:512; got text:{argument}")
    path, size = Path(expanded(data)), int(argument or CHARACTERS)
    file = path / f"{split}.txt" if os.path.isdir(path) else path
    found, line = [], 1
    for piece in pieces(read_text(file, "text", LARGEST), size):
        found.append((f"{file}, line {line}", piece))
        line += piece.count("\n")
    if file == path:
        found = [(where, piece) for where, piece in found if (_place_of(piece) < HELD_OUT_SHARE) == (split == "test")]
    if not found:
        raise TaskError(
            f"{file} has no pieces for {split}; cut smaller ones (--task text:{max(1, size // 4)}), or give a folder "
            "with train.txt and test.txt"
        )
    if split == "train":
        for where, piece in found:
            refuse_held_out(where, {"text": piece})
    return [Problem("", piece) for _, piece in found]


def reward(problem: Problem, text: str) -> float:
    """Score 1 for the piece itself: what a sampled text is worth is not known."""
    return float(text == problem.answer)


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of up to `size` characters, behind the last line break of a piece's second half if any.

    Else behind the last blank there. Nothing is left out.
    """
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            cuts = (text.rfind(mark, start + size // 2, end) + 1 for mark in ("\n", " "))
            end = next((cut for cut in cuts if cut), end)
        yield text[start:end]
        start = end


def _place_of(piece: str) -> float:
    return hashed(f"text {VERSION} {piece}")
