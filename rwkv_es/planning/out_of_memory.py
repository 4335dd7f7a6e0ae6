"""Running out of memory or disk, explained: the numbers, and what to change."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_es.config.file import run_folder
from rwkv_es.config.options import Config
from rwkv_es.planning.plan import Disk, Plan, alternatives, disk_of, make_plan
from rwkv_es.planning.text import size
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.task import Task

_HOPELESS = 4  # times the memory that is free: no prediction is so wrong
_BYTES_PER_ANSWER = 1000  # that a step asks for: what the host keeps of it


@contextmanager
def explaining_out_of_memory(config: Config, task: Task | None = None) -> Iterator[None]:
    """Turn running out of memory into one sentence with the numbers and what to change; at once where it is hopeless.

    Raises:
        ConfigError: that sentence.
    """
    made = make_plan(config, is_here=True, task=task)
    if made.memory.peak + _asked_bytes(made) > _HOPELESS * made.device.memory > 0:
        raise ConfigError(_sentence(made))
    if os.environ.get("RANK", "0") == "0":  # it alone writes
        refuse_full_disk(config, disk_of(made))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigError(_sentence(make_plan(config, is_here=True, task=task))) from None


def refuse_full_disk(config: Config, disk: Disk) -> None:
    """Refuse a run whose snapshots will not find room; what its folder holds already counts as free.

    Raises:
        ConfigError: with the sizes and what to change.
    """
    folder = run_folder(config)
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    if disk.total > disk.free + held:
        raise ConfigError(
            f"{folder} will take {size(disk.total)} (a snapshot is {size(disk.snapshot)}, {config.keep + 2} kept or "
            f"being written) and {size(disk.free + held)} are free there; try --keep 1, rwkv-es clean RUN for other "
            "runs, or --run FOLDER on a larger disk"
        )


def _asked_bytes(made: Plan) -> int:
    return _BYTES_PER_ANSWER * made.asked.first.answers // made.load.processes


def _is_out_of_memory(error: Exception) -> bool:
    """Recognise Python's error, torch's (torch.OutOfMemoryError is a RuntimeError), and its CPU allocator's."""
    text = str(error)
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    )


def _sentence(made: Plan) -> str:
    advice = f"try --slots {made.most}" if 0 < made.most < made.load.slots else "leave more memory free"
    others, taken = list(alternatives(made))[:2], size(made.memory.peak + _asked_bytes(made))
    return (
        f"out of memory: {made.load.slots:,} generations in flight of {made.header.name} take about {taken} and "
        f"{size(made.device.memory)} are there; {' or '.join([advice, *others])}"
    )
