"""Curves with bands as SVG."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, BOTTOM, LEGEND = 640, 360, 44, 36, 120
COLOURS = (
    *("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b"),
    *("#e377c2", "#7f7f7f", "#17becf", "#bcbd22", "#000000"),
)


class Curve(NamedTuple):
    """A line and its band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]  # 0 to 1
    low: Sequence[float]
    high: Sequence[float]


def drawn(curves: Sequence[Curve], x_label: str, is_log: bool = False) -> str:
    """Return a page-independent SVG: accuracy from 0 to 100 % over x."""
    values = [x for curve in curves for x in curve.x]
    first, last = min((x for x in values if x > 0), default=1.0), max(values, default=1.0)
    right = WIDTH - LEGEND

    def across(x: float) -> float:
        share = math.log(max(x, first) / first) / (math.log(last / first) or 1) if is_log else x / last
        return LEFT + (right - LEFT) * share

    def down(y: float) -> float:
        return 10 + (HEIGHT - BOTTOM - 10) * (1 - y)

    parts = [
        _frame(down, right),
        _label(f"{x_label}{', logarithmic' if is_log else ''}", (LEFT + right) / 2, HEIGHT - 4),
    ]
    parts += [_label(f"{first if is_log else 0:g}", LEFT, HEIGHT - 20), _label(f"{last:.4g}", right, HEIGHT - 20)]
    for place, (curve, colour) in enumerate(zip(curves, COLOURS)):
        line = _points((across(x), down(y)) for x, y in zip(curve.x, curve.y))
        upper = [(across(x), down(y)) for x, y in zip(curve.x, curve.high)]
        lower = [(across(x), down(y)) for x, y in zip(curve.x, curve.low)]
        parts.append(f"<polygon points='{_points(upper + lower[::-1])}' fill='{colour}' opacity='0.12'/>")
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts.append(f"<text x='{right + 8}' y='{24 + 18 * place}' fill='{colour}'>{curve.name}</text>")
    box = f"viewBox='0 0 {WIDTH} {HEIGHT}' font-family='sans-serif' font-size='12'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {box}>"
    return "\n".join([head, *parts, "</svg>\n"])


def _frame(down: Callable[[float], float], right: float) -> str:
    lines = [
        f"<line x1='{LEFT}' x2='{right}' y1='{down(y):.1f}' y2='{down(y):.1f}' stroke='#ccc'/>"
        f"<text x='4' y='{down(y) + 4:.1f}'>{y:.0%}</text>"
        for y in (0, 0.25, 0.5, 0.75, 1)
    ]
    return "\n".join([f"<rect width='{WIDTH}' height='{HEIGHT}' fill='#fff'/>", *lines])


def _label(text: str, x: float, y: float) -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}' text-anchor='middle'>{text}</text>"


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)
