"""Where a run's scalars go besides `metrics.jsonl`: TensorBoard, W&B and the like, through Accelerate.

Whatever a tracker raises is one sentence: at the start it ends the run, later it ends the tracker alone.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rwkv_es.config.options import Config
from rwkv_es.measure.glossary import grouped
from rwkv_es.system.errors import ConfigError

MAX_REASON_CHARS = 300
_NAME_OF_A_RUN = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "clearml": "task_name"}
_NAME_OF_A_RUN["swanlab"] = "experiment_name"
_COLUMNS = ("kind", "prompt", "completion", "reward")


class Tracker:
    """A tracker that is told of scalars until it fails."""

    def __init__(self, name: str, tracker: Any) -> None:
        self.name, self._tracker = name, tracker

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show it a step's scalars; if it fails, say so and leave it alone from now on."""
        self._call("log", grouped(metrics), step=step)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show it answers to read, if it takes any: as a table, or as text."""
        if hasattr(self._tracker, "log_table"):
            data = [[sample.get(name) for name in _COLUMNS] for sample in samples]
            self._call("log_table", "samples", columns=list(_COLUMNS), data=data, step=step)
        elif self.name == "tensorboard":
            text = "\n\n".join(f"    {json.dumps(dict(sample), ensure_ascii=False)}" for sample in samples)
            self._call("log", {"samples": text}, step=step)

    def close(self) -> None:
        """Let it write what it still holds."""
        self._call("finish")
        self._tracker = None

    def _call(self, what: str, *arguments: Any, **named: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, what)(*arguments, **named)
        except Exception as error:  # noqa: BLE001  a service's own errors of all kinds
            self._tracker = None
            print(
                f"rwkv-es: tracker {self.name} has failed ({_reason(error)}) and is told nothing more; metrics.jsonl "
                "has all of it",
                file=sys.stderr,
            )


@contextmanager
def open_tracker(config: Config, folder: Path | None, num_steps: int) -> Iterator[Tracker | None]:
    """Start a tracker for the run in `folder`, after `num_steps` steps; None if none is wanted.

    Raises:
        ConfigError: the tracker that the options name is not installed or cannot be started.
    """
    tracker = _start(config.tracker, folder, num_steps) if folder is not None else None
    try:
        yield tracker
    finally:
        if tracker is not None:
            tracker.close()


def _start(wanted: str, folder: Path, num_steps: int) -> Tracker | None:
    name = "tensorboard" if wanted == "auto" else wanted
    if name == "none" or (wanted == "auto" and not _is_installed(name)):
        return None
    if not _is_installed(name):
        raise ConfigError(f"tracker {name} is not installed; pip install {name}, or use --tracker none")
    try:
        return Tracker(name, _started(name, folder, num_steps))
    except Exception as error:  # noqa: BLE001  a service's own errors of all kinds
        if wanted != "auto":
            raise ConfigError(f"tracker {name} cannot be used ({_reason(error)}); or use --tracker none") from None
        print(f"rwkv-es: no scalars go to TensorBoard, which cannot be used ({_reason(error)})", file=sys.stderr)
        return None


def _started(name: str, folder: Path, num_steps: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import clear_environment

    with clear_environment():  # of what MPI, SLURM and others say of processes: this one trains alone
        PartialState(cpu=True)  # which trackers need; where processes train together, it is there already
    if name == "tensorboard":
        tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard", folder, purge_step=num_steps + 1)
    else:
        named = {_NAME_OF_A_RUN[name]: folder.name} if name in _NAME_OF_A_RUN else {}
        tracker = LOGGER_TYPE_TO_CLASS[name]("rwkv-es", **named)
    tracker.start()
    return tracker


def _is_installed(package: str) -> bool:
    """Say whether a package can be imported: a folder of its name, with what it has written, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _reason(error: Exception) -> str:
    """Return in a line what a library says."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MAX_REASON_CHARS else f"{said[:MAX_REASON_CHARS]} ..."
