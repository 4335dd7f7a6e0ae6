"""`rwkv-es watch`: a run in the terminal while it trains, from its folder alone; in lines where there is no room."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_es.measure.console import held_out_line, step_line
from rwkv_es.measure.reading import Standing, newest, standing_of, turns_of
from rwkv_es.run.ledger import read_metrics
from rwkv_es.system.curve import curve, series
from rwkv_es.system.texts import printable

LOOK_S = 1.0
_NARROWEST = 40  # characters of a terminal that has room for the screen
_ANSWER_LINES, _NUM_BEFORE = 10, 3  # lines of an answer; lines of what has been already, where there is no terminal
_SHOWN = (
    ("reward_mean", "reward"),
    ("eval/accuracy", "held-out accuracy"),
    ("nats_per_token", "nats a token"),
    ("tokens_per_answer", "tokens an answer"),
    ("turns_per_episode", "turns an episode"),
    ("share_stopped", "answers that end"),
    ("share_of_problems_with_signal", "problems with a signal"),
    ("step_rms_per_sigma", "moved, in sigma"),
    ("distance_from_base", "distance from the base"),
    ("sigma", "sigma"),
    ("lr", "lr"),
    ("tokens_per_s", "tokens/s"),
    ("generate_s", "generating, s"),
    ("score_s", "scoring, s"),
    ("wait_s", "waiting, s"),
    ("peak_memory_bytes", "peak memory, GB"),
    ("reward_errors", "reward errors"),
)


def watch(folder: Path) -> None:
    """Show a run until it ends; one that does not run is shown once.

    Raises:
        ConfigError: the folder holds no run.
    """
    standing = standing_of(folder)
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= _NARROWEST:
        _watch_terminal(folder)
    else:
        _print_lines(folder, standing)
    print(printable(ending(standing_of(folder))))


def ending(standing: Standing) -> str:
    """Say in a sentence how a run has ended and what may come next."""
    best = standing.best
    score = f"; best held-out reward {best.score:.3f} after step {best.step}" if best else ""
    where = f"{standing.folder}: {standing.state} after {standing.num_steps} of {standing.planned} steps{score}"
    return where if standing.state == "finished" else f"{where}; rwkv-es resume {standing.folder} goes on"


def line_of(row: Mapping[str, Any], planned: int) -> str:
    """Return a line of metrics.jsonl as the run prints it; "" for one that lacks numbers, of an earlier release say."""
    try:
        if "eval/reward" in row:
            return held_out_line(row["step"], dict(row))
        return step_line(planned, row["step"] - 1, dict(row))
    except (KeyError, TypeError, ArithmeticError):
        return ""


def _print_lines(folder: Path, standing: Standing) -> None:
    num_shown = max(0, len(read_metrics(folder)) - _NUM_BEFORE)
    while True:
        is_running = standing_of(folder).holder != ""  # asked first: what came before its end is still to be read
        rows = read_metrics(folder)
        for row in rows[num_shown:]:
            if line := line_of(row, standing.planned):
                print(line, flush=True)
        num_shown = max(num_shown, len(rows))
        if not is_running:
            return
        time.sleep(LOOK_S)


def _watch_terminal(folder: Path) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            rows = read_metrics(folder)
            standing = standing_of(folder, rows)
            live.update(screen(standing, rows, console.width, excerpt(newest(folder))), refresh=True)
            if not standing.holder:
                return
            time.sleep(LOOK_S)


def excerpt(sample: Mapping[str, Any]) -> str:
    """Return the end of a question and the beginning of its answer, an episode turn by turn; "" for no answer."""
    turns = "\n".join(f"{answer.strip()} > {reply.strip()}" for answer, reply, _ in turns_of(sample))
    answered = turns or str(sample.get("completion", ""))
    lines = [*str(sample.get("prompt", "")).split("\n")[-2:], *answered.split("\n")]
    shown = lines[:_ANSWER_LINES] + ["..."] * (len(lines) > _ANSWER_LINES)
    return "\n".join(printable(line.rstrip()) for line in shown if line.strip())


def screen(standing: Standing, rows: Sequence[Mapping[str, Any]], width: int, answer: str = "") -> Any:
    """Return what the terminal shows: how far the run is, its newest numbers, two curves, an answer."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    is_wide = width >= 100
    chart_width = max(20, width // 2 - 18 if is_wide else width - 16)
    charts = [
        Panel(Text(curve(series(rows, name), chart_width, 6)), title=title, width=chart_width + 16)
        for title, name in (("reward of the members", "reward_mean"), ("held-out reward", "eval/reward"))
    ]
    numbers = Table.grid(padding=(0, 2))
    cells = [(title, number) for name, title in _SHOWN if (number := _latest(rows, name))]
    per_row = 3 if is_wide else 2 if width >= 66 else 1
    for start in range(0, len(cells), per_row):
        row = [text for title, value in cells[start : start + per_row] for text in (f"[dim]{title}", value)]
        numbers.add_row(*row)
    bar = ProgressBar(total=max(standing.planned, 1), completed=standing.num_steps, width=min(40, width - 4))
    head = Table.grid(padding=(0, 2))
    head.add_row(bar, f"step {standing.num_steps} of {standing.planned}", time_left(standing, rows))
    title = Text(
        printable(f"{standing.folder} · {standing.options.get('task', '')} · {standing.state}").replace("\n", " ")
    )
    parts: list[Any] = [Columns(charts)] if is_wide else [*charts]
    parts += [Panel(Text(answer), title="best answer of the newest step", width=width)] if answer else []
    return Group(Panel(Group(head, Text(""), numbers), title=title, width=width), *parts)


def time_left(standing: Standing, rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how long the rest will take, by the last ten steps."""
    times = [row["elapsed_s"] for row in rows if "reward_mean" in row and "elapsed_s" in row][-11:]
    if standing.state != "running" or len(times) < 2:
        return ""
    left = (standing.planned - standing.num_steps) * (times[-1] - times[0]) / (len(times) - 1)
    minutes, seconds = divmod(round(left), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left" if minutes >= 60 else f"{minutes}:{seconds:02d} left"
    )


def _latest(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    if not (values := series(rows, name)):
        return ""
    last = values[-1] / 1e9 if name.endswith("_bytes") else values[-1]
    return f"{last:,.0f}" if abs(last) >= 1000 else f"{last:.4g}"
