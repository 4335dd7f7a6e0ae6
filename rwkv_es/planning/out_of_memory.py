"""Running out of memory, explained: the numbers, and what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

from rwkv_es.config.options import Config
from rwkv_es.errors import ConfigError
from rwkv_es.planning.plan import alternatives, make_plan
from rwkv_es.planning.text import size


@contextmanager
def explaining_out_of_memory(config: Config) -> Iterator[None]:
    """Turn running out of memory into one sentence with the numbers and what to change.

    Raises:
        ConfigError: that sentence.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ConfigError(_sentence(config)) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Recognise Python's error, torch's (torch.OutOfMemoryError is a RuntimeError), and its CPU allocator's."""
    text = str(error)
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
    )


def _sentence(config: Config) -> str:
    made = make_plan(config, is_here=True)
    advice = f"try --slots {made.most}" if 0 < made.most < made.load.slots else "leave more memory free"
    others = list(alternatives(made))[:2]
    return (
        f"out of memory: {made.load.slots:,} generations in flight of {made.header.name} take about "
        f"{size(made.memory.peak)} and {size(made.device.memory)} are there; {' or '.join([advice, *others])}"
    )
