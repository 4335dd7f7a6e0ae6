"""What is known of a model before it is loaded: its sizes by name, or from its file's header. Needs no torch."""

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from rwkv_es.model.layout import HEAD_SIZE, Arch, check_shapes, infer, refuse_other_models
from rwkv_es.pretrained import huggingface
from rwkv_es.pretrained.formats import check_archive, kind_of
from rwkv_es.system.errors import CheckpointError, ConfigError
from rwkv_es.system.hub import HUB, fetched, skimmed
from rwkv_es.system.texts import shown

LARGEST_HEADER = 1 << 26  # bytes: names and shapes of a model of a few thousand tensors take less than one
_TINY = Path(__file__).parent.parent / "tiny"
EMBEDDED = {"tiny": _TINY / "rwkv7-tiny.pth", "tiny-guess": _TINY / "rwkv7-tiny-guess.pth"}
_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "I8": "int8"}  # of safetensors
_STORAGES = {"FloatStorage": "fp32", "BFloat16Storage": "bf16", "HalfStorage": "fp16", "CharStorage": "int8"}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a value; of any other type at least one
_MOST_DIMS, _LONGEST_NAME = 8, 200
_GIVE_FILE = 'give a .pth or .safetensors file, or "tiny" for the embedded model'


class Header(NamedTuple):
    """A model's sizes, how it is stored, and what to call it."""

    arch: Arch
    dtype: str  # "fp32", "bf16" or "fp16"
    name: str


class _Shape(NamedTuple):
    """All that a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    num_held: float  # values that the file has for it

    def dim(self) -> int:
        return len(self.shape)


def _official(n_layer: int, n_embd: int, *ranks: int) -> Arch:
    return Arch(n_layer, n_embd, n_embd // HEAD_SIZE, HEAD_SIZE, 65536, 4 * n_embd, *ranks)


SIZES = {  # of the released World models; ranks of w, a, v, g
    "0.1b": _official(12, 768, 64, 64, 32, 128),
    "0.4b": _official(24, 1024, 64, 64, 32, 128),
    "1.5b": _official(24, 2048, 96, 96, 64, 256),
    "2.9b": _official(32, 2560, 96, 96, 64, 320),
    "7.2b": _official(32, 4096, 128, 128, 96, 480),
    "13.3b": _official(61, 4096, 192, 192, 128, 384),
}


def resolve(model: str) -> Path:
    """Return the file or Hugging Face directory that a model name means; ".pth" may be left out.

    "tiny" and "tiny-guess" are embedded; what begins with "hf:" is fetched from the hub.

    Raises:
        CheckpointError: there is no such file.
    """
    if model in EMBEDDED:
        return EMBEDDED[model]
    if model.startswith(HUB):
        return fetched(model)
    if huggingface.is_directory(Path(model)):
        return Path(model)
    for path in (model, model + ".pth"):
        if os.path.isfile(path):
            return Path(path)
    what = _in_folder(Path(model)) if os.path.isdir(model) else f"does not exist; {_GIVE_FILE}"
    raise CheckpointError(f"model {model!r} {what}")


def _in_folder(folder: Path) -> str:
    """Say what to give instead of a folder."""
    if (folder / "config.yaml").is_file() and (folder / "ledger.jsonl").is_file():
        return f"is the folder of a run; give the file that this makes: rwkv-es export {folder}"
    found = next((path for place in ("*.pth", "snapshots/*/*.pth") for path in sorted(folder.glob(place))), None)
    if found is not None:
        return f"is a folder; give one of its files, such as {found}"
    if (folder / "refs" / "main").is_file():
        inner = next(iter(sorted(folder.glob("snapshots/*"))), "snapshots/...")
        return f"is a folder of the Hugging Face cache; give the Hugging Face directory in it, such as {inner}"
    if any(folder.glob("pytorch_model*")):
        return "is a Hugging Face directory of pickled weights; give one with model.safetensors"
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors*")):
        return "is an incomplete Hugging Face directory: it needs config.json and model.safetensors, or their index"
    return f"is a folder; {_GIVE_FILE}"


def describe(model: str) -> Header:
    """Return the sizes of a model: a released size such as "7.2b", or a file, of which only the header is read.

    Raises:
        CheckpointError: there is no such file, or its header is not that of an RWKV-7 model.
        ConfigError: neither a size nor a file.
    """
    size = model.lower().removesuffix("b") + "b"
    if size in SIZES and not os.path.exists(model):
        return Header(SIZES[size], "bf16", size)
    try:
        return read_header(skimmed(model) if model.startswith(HUB) else resolve(model))
    except CheckpointError:
        if os.path.exists(model) or model.endswith((".pth", ".safetensors")):
            raise
        raise ConfigError(f"model {model!r} is no file and no released size ({', '.join(SIZES)}, tiny)") from None


def read_header(path: Path) -> Header:
    """Read names, shapes and dtypes of a checkpoint's tensors; nothing in the file is run, no value is read.

    Raises:
        CheckpointError: it is unreadable, or not of an RWKV-7 model.
    """
    is_directory = huggingface.is_directory(path)
    tensors = _of_directory(path) if is_directory else _of_file(path)
    refuse_other_models(path, tensors)
    arch = infer(path, tensors)
    check_shapes(path, tensors, arch)
    if is_directory:
        huggingface.check_sizes(path, arch)
    dtype = tensors["emb.weight"].dtype
    if dtype not in ("fp32", "bf16", "fp16"):
        raise CheckpointError(f"{path}: emb.weight is {shown(dtype)}; weights must be float32, bfloat16 or float16")
    return Header(arch, dtype, path.name)


def _of_directory(folder: Path) -> Any:
    huggingface.read_config(folder)
    shards = {file: _of_file(file) for file in huggingface.weight_files(folder)}
    places = huggingface.in_official_layout(folder, shards).items()
    return {
        name: (stored := shards[file][there])._replace(shape=official.shape(stored.shape))
        for name, (file, there, official) in places
    }


def _of_file(path: Path) -> Any:
    """Return what a file's header says of its tensors, whatever model they are of."""
    kind = kind_of(path)
    if kind != "safetensors":
        check_archive(path)
    try:
        found = _of_safetensors(path) if kind == "safetensors" else _of_pth(path)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - what a damaged file makes of a reader has no common type
        raise CheckpointError(f"{path} has no readable header ({type(error).__name__}); download it again") from None
    check_names(path, found)
    tensors: Any = {name: shape for name, shape in found.items() if isinstance(shape, _Shape)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give the file of a model's weights")
    _check_extents(path, tensors)
    return tensors


def check_names(path: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse names that are no names: messages repeat them.

    Raises:
        CheckpointError: one is long, or holds what a terminal would act upon.
    """
    for name in tensors:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise CheckpointError(f"{path} is no plain state dict: a tensor is called {shown(name)}")


def _check_extents(path: Path, tensors: Mapping[str, _Shape]) -> None:
    """Refuse tensors that are empty or claim more values than the file holds."""
    total = 0
    for name, (shape, dtype, num_held) in tensors.items():
        count = math.prod(shape[:_MOST_DIMS])
        total += count * _BYTES.get(dtype, 1)
        if len(shape) > _MOST_DIMS or min(shape, default=1) < 1:
            raise CheckpointError(f"{path}: {name} has no values, or no shape of a tensor; it is no plain state dict")
        if count > num_held or total > 2 * path.stat().st_size:
            raise CheckpointError(f"{path}: {name} claims more values than the file holds; it is no plain state dict")


def _of_safetensors(path: Path) -> dict[str, _Shape]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > LARGEST_HEADER:
            raise CheckpointError(f"{path} is no safetensors file: its header would have {size} bytes")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    most = path.stat().st_size - 8 - size
    return {name: _of_entry(entry, most) for name, entry in header.items()}


def _of_entry(entry: Any, most: int) -> _Shape:
    start, end = map(int, entry["data_offsets"])
    dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
    return _Shape(tuple(map(int, entry["shape"])), dtype, (min(end, most) - start) / _BYTES.get(dtype, 1))


def _of_pth(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is no .pth file of today's format, or damaged; its sizes are known once loaded")
    with zipfile.ZipFile(path) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        if entry.file_size > LARGEST_HEADER:
            raise CheckpointError(f"{path} is no plain state dict: its header has {entry.file_size} bytes")
        sizes = {info.filename.rpartition("/data/")[2]: info.file_size for info in archive.infolist()}
        with archive.open(entry) as file:
            content = _Unpickler(file, sizes).load()
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return {str(name): value for name, value in content.items()}


class _Dict(dict[str, Any]):
    pass


class _Unpickler(pickle.Unpickler):
    """Reads the description of tensors: a tensor becomes its shape, a storage its dtype and how many values it has."""

    def __init__(self, file: IO[bytes], sizes: Mapping[str, int]) -> None:
        super().__init__(file)
        self.sizes = sizes  # bytes of the storages by their keys

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for the few names that a state dict needs; nothing is imported.

        Raises:
            pickle.UnpicklingError: another name.
        """
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict  # which may be given attributes: a module's state dict has some
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, *_: _Shape(tuple(map(int, size)), *storage)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _STORAGES.get(name, name)
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """Return dtype and length of the storage that a tensor lies in: ("storage", type, key, device, size)."""
        return pid[1], min(int(pid[4]), self.sizes.get(str(pid[2]), 0) / _BYTES.get(pid[1], 1))
