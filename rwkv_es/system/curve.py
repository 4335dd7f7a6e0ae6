"""A curve of text, for terminals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_es.system.files import is_finite

_BLOCKS, _WIDEST = " ▁▂▃▄▅▆▇█", 4  # heights of a character; characters per value


def series(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Collect the finite values of a metric over the lines of metrics.jsonl."""
    return [row[name] for row in metrics if is_finite(row.get(name))]


def curve(values: Sequence[float], width: int = 60, height: int = 8) -> str:
    """Draw values as a chart of text, with the lowest and highest value at its left."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "(nothing to draw yet)"
    count = len(values)
    if count > width:
        columns = [values[index * (count - 1) // (width - 1)] for index in range(width)]
    else:
        columns = [value for value in values for _ in range(min(width // count, _WIDEST))]
    low, high = min(columns), max(columns)
    levels = [round((value - low) / ((high - low) or 1) * (height * 8 - 1)) + 1 for value in columns]
    lines = []
    for row in reversed(range(height)):
        label = f"{high:8.3f}" if row == height - 1 else f"{low:8.3f}" if row == 0 else ""
        lines.append(f"{label:>8} │{''.join(_BLOCKS[min(max(level - 8 * row, 0), 8)] for level in levels)}".rstrip())
    return "\n".join(lines)
