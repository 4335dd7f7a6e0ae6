"""Where a run's scalars go besides `metrics.jsonl`: TensorBoard, W&B and the like, through Accelerate."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_es.config.options import Config
from rwkv_es.errors import ConfigError


@contextmanager
def open_tracker(config: Config, folder: Path | None, num_steps: int) -> Iterator[Any]:
    """Start one of Accelerate's trackers for the run in `folder`, after `num_steps` steps; None if none is wanted.

    Raises:
        ConfigError: the tracker is not installed or cannot be started.
    """
    name = _tracker_name(config.tracker)
    if folder is None or name == "none":
        yield None
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    try:
        if name == "tensorboard":
            tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard", folder, purge_step=num_steps + 1)
        else:
            tracker = LOGGER_TYPE_TO_CLASS[name]("rwkv-es", name=folder.name)
        tracker.start()
    except (ImportError, KeyError) as error:
        raise ConfigError(f"tracker {name} cannot be used ({error}); install it, or use --tracker none") from None
    yield tracker
    tracker.finish()


def _tracker_name(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
