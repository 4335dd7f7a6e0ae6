"""What a file is by its first bytes, whatever its name says; and archives that are safe to unpickle."""

import codecs
import os
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

from rwkv_es.system.errors import CheckpointError
from rwkv_es.system.texts import shown

LARGEST_PICKLE = 8 << 20  # bytes that describe a model's tensors: a few hundred each
_MOST_OPERATIONS = 500_000  # of the largest model there are some 60,000
_DEEP = 257 + 8
_LINE = 64  # bytes that tell a text
_GIVE = "give the .pth or .safetensors file of the weights"
_PACKED = "is packed by {}; unpack it first".format
_KNOWN: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", f"is a GGUF file, made for llama.cpp; {_GIVE} that it was made from"),
    (b"fmgg", f"is a file of rwkv.cpp; {_GIVE} that it was made from"),
    (b"lmgg", f"is a ggml file; {_GIVE} that it was made from"),
    (b"tjgg", f"is a ggml file; {_GIVE} that it was made from"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the model; fetch the real file with `git lfs pull`"),
    (b"\x1f\x8b", _PACKED("gzip")),
    (b"\x1f\x9d", _PACKED("compress")),
    (b"\x28\xb5\x2f\xfd", _PACKED("zstd")),
    (b"\xfd7zXZ", _PACKED("xz")),
    (b"\x5d\0\0", _PACKED("lzma")),
    (b"LZIP", _PACKED("lzip")),
    (b"\x04\x22\x4d\x18", _PACKED("lz4")),
    (b"\x02\x21\x4c\x18", _PACKED("lz4")),
    (b"\xff\x06\0\0sNaPpY", _PACKED("snappy")),
    (b"BZh", _PACKED("bzip2")),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"\x93NUMPY", f"is a NumPy array; {_GIVE}"),
    (b"\x89HDF", f"is an HDF5 file; {_GIVE}"),
    (b"%PDF", f"is a PDF; {_GIVE}"),
    (b"PAR1", f"is a parquet file; {_GIVE}"),
    (b"SQLite format 3\0", f"is an SQLite database; {_GIVE}"),
    (b"\x89PNG", f"is a picture; {_GIVE}"),
    (b"\xff\xd8\xff", f"is a picture; {_GIVE}"),
    (b"GIF8", f"is a picture; {_GIVE}"),
    (b"\x7fELF", f"is a program; {_GIVE}"),
)
_ONNX = re.compile(rb"\x08[\1-\x1f](?:[\x12\x1a\x22\x2a\x32\x3a\x42]|\x28.)", re.DOTALL)  # version, next field
_ZIP = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
_OLD_PICKLE = re.compile(rb"c[\w.]+\n\w+\n")  # protocol 0: a text, but one that its reader refuses by its own name
_PAGES = ("<!doctype", "<html", "<?xml", "<!--", "<head", "<body")
_ENCODINGS: tuple[tuple[bytes, str], ...] = (  # by the mark at a text's start, the longer ones first
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
    (b"\xef\xbb\xbf", "utf-8"),
)


def kind_of(path: Path) -> str:
    """Return "safetensors", "zip" (torch.save's format) or "pickle" (its older one; or what no reader knows).

    Raises:
        CheckpointError: it is something else; what, and what to do.
    """
    start = _start(path)
    size = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and size < os.path.getsize(path):  # first of all: its first bytes are a number, any number
        return "safetensors"
    if start.startswith(_ZIP):
        return "zip"
    if words := _words(start):
        raise CheckpointError(f"{path} {words}")
    return "safetensors" if path.suffix == ".safetensors" else "pickle"


def _words(start: bytes) -> str:
    """Say what a file is that begins so, and what to do; "" if it is not known."""
    for mark, words in _KNOWN:
        if start.startswith(mark):
            return words
    if start[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model; {_GIVE}"
    if start[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    if not start.strip(b"\0"):
        return "begins with nothing but zeros: it was never written whole; download it again"
    if not (text := _text(start).strip()):
        return f"is an ONNX model; {_GIVE} that it was made from" if _ONNX.match(start) else ""
    if text.lower().startswith(_PAGES):
        return "is a web page, not a model; download the file itself"
    if text.startswith("{"):
        return _json_words(text)
    return "" if _OLD_PICKLE.match(start) else f"is a text ({shown(text[:40])}), not a model; {_GIVE}"


def _text(start: bytes) -> str:
    """Return the beginning of a file as a text, whatever its encoding; "" if it is none."""
    mark, name = next(((m, name) for m, name in _ENCODINGS if start.startswith(m)), (b"", ""))
    few = start[:_LINE]
    if not name and not few[1::2].strip(b"\0"):
        name = "utf-16-le"  # without a mark
    elif not name and not few[::2].strip(b"\0"):
        name = "utf-16-be"
    for encoding in (name,) if name else ("utf-8", "cp1252"):
        try:
            line = codecs.getincrementaldecoder(encoding)().decode(few[len(mark) :])
        except UnicodeDecodeError:
            continue
        is_likely = encoding != "cp1252" or (line[0].isalnum() and 2 * sum(map(str.isascii, line)) > len(line))
        if is_likely and all(c.isprintable() or c in "\t\n\r\f\ufeff\xa0" for c in line):
            return start[len(mark) :].decode(encoding, "replace")
    return ""


def _start(path: Path) -> bytes:
    if os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no regular file"
        raise CheckpointError(f"{path} is {what}; give a .pth or .safetensors file")
    try:
        with path.open("rb") as file:
            start = file.read(_DEEP)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give a .pth or .safetensors file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not start:
        raise CheckpointError(f"{path} is empty; download it again")
    return start


def _json_words(text: str) -> str:
    if "weight_map" in text or "total_size" in text:
        return f"is the index of a model in several files; join them, and {_GIVE} with the official names"
    if '"error"' in text:
        return "is an error message of the place it was downloaded from; download the file itself"
    return f"is JSON, not a model; {_GIVE}"


def check_archive(path: Path) -> None:
    """Look at how a file of torch.save describes its tensors before anything is unpickled.

    Raises:
        CheckpointError: it is no plain state dict, or would take more time or memory than one can.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                _check_pickles(path, file, 4)  # a mark, a version, the system, the state dict
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or len(set(names)) < len(names):
                what = (
                    "has entries of the same name" if pickles else "is a zip archive without a model; unpack it first"
                )
                raise CheckpointError(f"{path} {what}; {_GIVE}")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} was packed again with compression; {_GIVE} as torch.save writes it")
            with archive.open(pickles[0]) as file:
                _check_pickles(path, file, 1)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, UnicodeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({str(error)[:80]}); download it again") from None


def _check_pickles(path: Path, file: IO[bytes], count: int) -> None:
    """Walk through pickles without running them: bounded, with texts as keys."""
    bounded = _Bounded(file, LARGEST_PICKLE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in damaged texts
            for _ in range(count):
                _walk(bounded)
    except _TooMuch as error:
        raise CheckpointError(f"{path} is refused: {error}; save the state dict alone") from None
    except (ValueError, UnicodeError, IndexError, KeyError, OverflowError, MemoryError):
        return  # damaged: its reader says so


class _TooMuch(Exception):
    pass


class _Bounded:
    """A file of which no more than so many bytes are read."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self.file, self.left = file, most

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        self.left -= size
        if size < 0 or self.left < 0:
            raise _TooMuch("what describes its tensors is larger than any model needs")
        return self.file.read(size)

    def readline(self) -> bytes:
        """Return the next line."""
        line = self.file.readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise _TooMuch("what describes its tensors is larger than any model needs")
        return line


def _walk(file: Any) -> None:
    """Follow a pickle's stack as far as to know which keys are texts."""
    stack: list[str] = []
    memo: dict[Any, str] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if number > _MOST_OPERATIONS:
            raise _TooMuch("what describes its tensors takes more steps than any model needs")
        name = operation.name
        if name in ("SETITEM", "SETITEMS", "DICT"):
            taken = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _to_mark(stack)
            if any(kind != "text" for kind in taken[::2]):
                raise _TooMuch("it names tensors by something else than texts")
            stack.extend(["dict"] if name == "DICT" else [])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append("mark")
        elif "UNICODE" in name:
            stack.append("text")
        elif name in ("EMPTY_SET", "ADDITEMS", "FROZENSET"):
            raise _TooMuch("it holds sets")
        elif name != "STOP":
            _refuse_slow_keys(name, stack)
            before = [item.name for item in operation.stack_before]
            taken = _to_mark(stack) if "mark" in before else []
            before = before[: before.index("mark")] if "mark" in before else before
            taken += stack[len(stack) - len(before) :]
            del stack[len(stack) - len(before) :]
            stack.extend(_kind(name, argument, taken) for _ in operation.stack_after)


def _refuse_slow_keys(name: str, stack: list[str]) -> None:
    """Refuse what makes the unpickler hash tuples within tuples, which takes twice as long for every level."""
    if name == "REDUCE" and stack[-2] == "ordered" and stack[-1] != "empty":
        raise _TooMuch("it makes a dictionary of something else than its items")
    if name in ("BINPERSID", "PERSID") and stack[-1] == "deep":
        raise _TooMuch("it names a storage by something else than a text")


def _kind(name: str, argument: Any, taken: list[str]) -> str:
    """Return what an operation leaves on the stack."""
    if "TUPLE" in name:
        tuples = {"empty", "flat", "deep"}
        return "empty" if not taken else "deep" if tuples & {*taken} else "flat"
    return "ordered" if name == "GLOBAL" and argument == "collections OrderedDict" else "thing"


def _to_mark(stack: list[str]) -> list[str]:
    """Take what is above the last mark off the stack, and the mark."""
    place = len(stack) - 1 - stack[::-1].index("mark")
    taken = stack[place + 1 :]
    del stack[place:]
    return taken
