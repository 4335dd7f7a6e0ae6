"""Tables and curves of a folder's records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from .drawing import Curve, drawn
from .records import Record, final_runs, read_records

HALF = 0.5  # accuracy whose cost a table names
HEADER = (
    "| method | settings | accuracy | mean@8 | pass@8 | to {level}: CPU s | to {level}: answers | gained / lost | "
    "CPU s | answers | tokens/s | peak MB |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def tables(folder: Path, level: float = HALF) -> str:
    """Write tables.md and a curve by seconds and by answers for each task; return the tables."""
    records = read_records(folder)
    parts = []
    for task in dict.fromkeys(record["task"] for record in records):
        for control in dict.fromkeys(record["control"] for record in records):
            runs = final_runs(records, task, control)
            if not runs:
                continue
            parts.append(f"### {task}{'' if control == 'none' else f', rewards {control}'}\n\n{table(runs, level)}")
            name = task if control == "none" else f"{task}-{control}"
            for axis in ("cpu_s", "generations"):
                draw(folder / f"{name}-{axis}.svg", runs, axis)
    text = "\n\n".join(parts) + "\n"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    return text


def table(runs: dict[str, list[list[Record]]], level: float = HALF) -> str:
    """Return one task's table, the best mean accuracy first."""
    order = sorted(runs, key=lambda method: -fmean(run[-1]["accuracy"] for run in runs[method]))
    header = HEADER.format(level=f"{100 * level:.0f} %")
    return "\n".join([header, *(row(method, runs[method], level) for method in order)])


def row(method: str, runs: Sequence[Sequence[Record]], level: float = HALF) -> str:
    """Return a method's row: means over seeds, ± the standard deviation."""
    last = [run[-1] for run in runs]

    def mean(name: str) -> float:
        return fmean(record[name] for record in last)

    accuracy = [record["accuracy"] for record in last]
    settings = ", ".join(f"{name} {short(value)}" for name, value in last[0]["settings"].items())
    cells = [
        method,
        settings,
        f"{fmean(accuracy):.1%} ± {pstdev(accuracy):.1%}",
        f"{mean('mean@8'):.1%}",
        f"{mean('pass@8'):.1%}",
        cost_to(level, runs, "cpu_s", "{:.1f}"),
        cost_to(level, runs, "generations", "{:.0f}"),
        f"{mean('gained'):.0f} / {mean('lost'):.1f}",
        f"{mean('cpu_s'):.1f}",
        f"{mean('generations'):.0f}",
        f"{mean('tokens') / mean('cpu_s'):.0f}",
        f"{mean('peak_bytes') / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def short(value: object) -> str:
    """Write a setting."""
    if isinstance(value, dict):
        return "+".join(f"{name.split('.')[0]}×{factor:g}" for name, factor in value.items())
    return "+".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def cost_to(level: float, runs: Sequence[Sequence[Record]], axis: str, form: str) -> str:
    """Return the mean cost of the first point at `level` or more, and of how many runs if not all got there."""
    costs = [next((r[axis] for r in run if r["accuracy"] >= level), None) for run in runs]
    known = [cost for cost in costs if cost is not None]
    if not known:
        return "–"
    return form.format(fmean(known)) + ("" if len(known) == len(runs) else f" ({len(known)} of {len(runs)})")


def draw(path: Path, runs: dict[str, list[list[Record]]], axis: str) -> None:
    """Draw every method's mean accuracy with the band of its runs."""
    curves = [Curve(method, *band(own, lambda record: record[axis])) for method, own in runs.items()]
    label = {"cpu_s": "CPU seconds", "generations": "answers"}[axis]
    path.write_text(drawn(curves, label, is_log=axis == "generations"), encoding="utf-8")


def band(
    runs: Sequence[Sequence[Record]], place: Callable[[Record], float]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return x, mean, lowest and highest accuracy; the runs' points are taken in order."""
    points = list(zip(*runs))  # as many as the shortest run has
    values = [[record["accuracy"] for record in point] for point in points]
    x = [fmean(map(place, point)) for point in points]
    return x, list(map(fmean, values)), list(map(min, values)), list(map(max, values))
