"""A run at a glance: report.html, one self-contained page, and a small curve for the terminal."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rwkv_es.run.identity import read_config
from rwkv_es.run.ledger import best_weights, read_metrics
from rwkv_es.run.made import making
from rwkv_es.system.files import read_sound_lines, replace, writing

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 200, 52, 24  # of a chart, in pixels; margins for the labels
_NUM_SAMPLES = 6
_BLOCKS, _WIDEST = " ▁▂▃▄▅▆▇█", 4  # heights of a character in the terminal's curve; characters per value
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --dim: #6b7486; --paper: #fff; --line: #e3e6ec; --accent: #3566d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --dim: #98a1b3; --paper: #14171d; --line: #2c323d; --accent: #7ea6ff; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 720px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; } .dim, figcaption, th { color: var(--dim); }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 11px; }
polyline { fill: none; stroke: var(--accent); stroke-width: 2; } polygon { fill: var(--accent); opacity: .18; }
circle { fill: var(--accent); } svg line { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); font-weight: normal; } td:last-child { font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: color-mix(in srgb, var(--line) 35%, transparent);
  padding: .75rem; border-radius: 6px; font-size: 13px; }
"""


class Series(NamedTuple):
    """A curve; `spread` widens it to a band."""

    steps: list[int]
    values: list[float]
    spread: list[float]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder. Returns its path.

    Raises:
        ConfigError: the folder holds no run, a file of it is broken, or the page cannot be written.
    """
    options = read_config(run_folder)
    metrics = read_metrics(run_folder)
    samples = read_sound_lines(run_folder / "samples.jsonl")
    path = run_folder / "report.html"
    with making(run_folder, [path]), writing(path):
        replace(path, _page(run_folder, options, metrics, samples))
    return path


def series(metrics: Sequence[Mapping[str, Any]], name: str, spread: str = "") -> Series:
    """Collect the finite values of a metric over the steps."""
    rows = [row for row in metrics if _is_finite(row.get(name))]
    spreads = [row[spread] if _is_finite(row.get(spread)) else 0.0 for row in rows]
    return Series([row["step"] for row in rows], [row[name] for row in rows], spreads)


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


def _page(folder: Path, options: Mapping[str, Any], metrics: list[dict], samples: list[dict]) -> str:
    known = best_weights(folder)
    best_line = f"Best held-out reward {known.score:.3f}, after {known.step} steps." if known else ""
    title = f"{options.get('task', '')} · {folder.name}"
    charts = [
        _chart("Reward of the members: mean and spread", series(metrics, "reward_mean", "reward_std_of_members")),
        _chart("Held-out accuracy", series(metrics, "eval/accuracy")),
        _chart("What moves per step, in units of sigma", series(metrics, "step_rms_per_sigma")),
        _chart("Tokens per answer", series(metrics, "tokens_per_answer")),
    ]
    parts = [
        f"<h1>{escape(title)}</h1><p class='dim'>{escape(best_line)}</p>",
        *charts,
        "<h2>Last metrics</h2>" + _table(_last(metrics)),
        "<h2>Samples</h2>" + "".join(map(_sample, samples[-_NUM_SAMPLES:])),
        f"<h2>Options</h2><pre>{escape(yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True))}</pre>",
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    return (
        f"<!doctype html>\n<html lang='en'>{head}<style>{_STYLE}</style><body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _chart(title: str, data: Series) -> str:
    if not data.values:
        return ""
    low = min(value - spread for value, spread in zip(data.values, data.spread))
    high = max(value + spread for value, spread in zip(data.values, data.spread))
    last = max(data.steps[-1], 1)

    def point(step: int, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 8) * step / last
        y = 8 + (_HEIGHT - _BOTTOM - 8) * (1 - (value - low) / ((high - low) or 1))
        return f"{x:.1f},{y:.1f}"

    line = [point(step, value) for step, value in zip(data.steps, data.values)]
    upper = [point(step, value + spread) for step, value, spread in zip(*data)]
    lower = [point(step, value - spread) for step, value, spread in zip(*data)]
    band = f"<polygon points='{' '.join(upper + lower[::-1])}'/>" if any(data.spread) else ""
    x, y = line[-1].split(",")
    base = _HEIGHT - _BOTTOM
    return (
        f"<figure><figcaption>{escape(title)}: now {data.values[-1]:.4g}</figcaption>"
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(title)}'>"
        f"<line x1='{_LEFT}' y1='{base}' x2='{_WIDTH}' y2='{base}'/><line x1='{_LEFT}' y1='8' x2='{_WIDTH}' y2='8'/>"
        f"<text x='0' y='12'>{high:.4g}</text><text x='0' y='{base}'>{low:.4g}</text>"
        f"<text x='{_LEFT}' y='{_HEIGHT - 6}'>step 0</text>"
        f"<text x='{_WIDTH - 8}' y='{_HEIGHT - 6}' text-anchor='end'>{last}</text>"
        f"{band}<polyline points='{' '.join(line)}'/><circle cx='{x}' cy='{y}' r='3'/></svg></figure>"
    )


def _last(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the newest value of every metric."""
    return {name: value for row in metrics for name, value in row.items()}


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def _sample(sample: Mapping[str, Any]) -> str:
    label = f"step {sample.get('step')}, reward {_text(sample.get('reward'))}"
    text = f"{sample.get('prompt', '')}\n→ {sample.get('completion', '')}"
    return f"<p class='dim'>{escape(label)}</p><pre>{escape(text)}</pre>"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "missing" if value is None else str(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
