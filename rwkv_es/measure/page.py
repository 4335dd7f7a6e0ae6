"""report.html: runs at a glance, in one page that needs nothing else and is safe to open."""

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from rwkv_es import __version__
from rwkv_es.config.file import is_run_folder
from rwkv_es.measure.glossary import metric
from rwkv_es.measure.reading import run_data
from rwkv_es.run.made import making
from rwkv_es.system import files
from rwkv_es.system.errors import ConfigError

_MARK = b'<meta name="generator" content="rwkv-es report">'  # by it a page is known as one that may be replaced
_HERE = Path(__file__).parent
CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Held-out reward", ("eval/reward",)),
    ("Held-out accuracy", ("eval/accuracy",)),
    ("Reference answers", ("nats_per_token", "eval/nats_per_token")),
    ("Reward of the members, mean and spread", ("reward_mean",)),
    ("What a step moves", ("step_rms_per_sigma",)),
    ("Distance from the base", ("distance_from_base",)),
    ("Problems with a signal", ("share_of_problems_with_signal",)),
    ("Tokens an answer", ("tokens_per_answer", "eval/tokens_per_answer")),
    ("Answers that end by themselves", ("share_stopped", "eval/share_stopped")),
    ("Turns an episode", ("turns_per_episode", "eval/turns_per_episode")),
    ("Tokens an episode", ("tokens_per_episode", "eval/tokens_per_episode")),
    ("Tokens a second", ("tokens_per_s",)),
    ("Time of a step", ("generate_s", "score_s", "wait_s", "update_s")),
    ("Noise scale sigma", ("sigma",)),
    ("Learning rate", ("lr",)),
    ("Peak memory", ("peak_memory_bytes", "peak_gpu_memory_bytes")),
)
_BANDS = {"reward_mean": "reward_std_of_members"}
_IN_GROUPS = (("Rewards by name", "reward/"), ("Logged by rewards", "log/"), ("Waiting", "wait_s_of_rank_"))
_MOST_IN_A_CHART = 8


def write_report(folders: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write a page about runs: into the run's folder, or for several of them to `out`. Returns its path.

    Raises:
        ConfigError: a folder holds no run, a file of it is broken, or the page cannot be written.
    """
    folders = [folders] if isinstance(folders, Path) else list(folders)
    if out is None:
        out = folders[0] / "report.html"
    if is_run_folder(str(out.parent)):
        text = page(folders)
        with making(out.parent, [out]), files.writing(out):
            files.replace(out, text)
        return out
    if os.path.lexists(out) and not _is_ours(out):
        raise ConfigError(f"{out} exists and is no report; choose another --out, or remove it first")
    text = page(folders)
    with files.writing(out):
        files.replace(out, text)
    return out


def page(folders: Sequence[Path]) -> str:
    """Return the page about runs."""
    runs = [run_data(folder, name) for folder, name in zip(folders, names_of(folders))]
    names = list(dict.fromkeys(name for run in runs for name in run["series"]))
    known = {name: found for name in names if (found := metric(name)) is not None}
    data = {
        "runs": runs,
        "charts": charts_of(names, len(runs) > 1),
        "glossary": {name: {"unit": found.unit, "meaning": found.meaning} for name, found in known.items()},
    }
    filled = {
        "title": escape(" and ".join(run["name"] for run in runs)),
        "version": __version__,
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        "script": (_HERE / "page.js").read_text(encoding="utf-8"),
        "data": as_json(data),
    }
    first, *rest = (_HERE / "page.html").read_text(encoding="utf-8").split("{{")
    parts = (part.partition("}}") for part in rest)
    return first + "".join(filled[name] + text for name, _, text in parts)


def as_json(data: Any) -> str:
    """Return JSON that ends no script element, whatever its texts hold."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return short names of folders, each its own."""
    paths = [Path(os.path.realpath(folder)) for folder in folders]
    depth = next((n for n in range(1, 20) if len({path.parts[-n:] for path in paths}) == len(paths)), 1)
    return ["/".join(path.parts[-depth:]) for path in paths]


def charts_of(names: Iterable[str], is_split: bool = False) -> list[dict[str, Any]]:
    """Return which charts to draw of the metrics that are there; is_split: of one metric each."""
    names = list(names)
    charts = [(title, [name for name in wanted if name in names]) for title, wanted in CHARTS]
    shown = {name for _, wanted in charts for name in wanted}
    evaluated = sorted(
        n for n in names if n.startswith("eval/") and n.endswith(("/reward", "/accuracy")) and n not in shown
    )
    sampled = dict.fromkeys(name.rpartition("@")[0] + "@" for name in names if name.startswith("eval/") and "@" in name)
    alike = [(start, [name for name in names if name.startswith(start)]) for start in sampled]  # of all k
    charts[3:3] = [
        (f"Held out: {name.removeprefix('eval/')}", wanted)
        for name, wanted in (*((name, [name]) for name in evaluated), *((f"{start}k", found) for start, found in alike))
    ]
    for title, start in _IN_GROUPS:
        found = [name for name in names if name.startswith(start)]
        parts = [found[i : i + _MOST_IN_A_CHART] for i in range(0, len(found), _MOST_IN_A_CHART)]
        charts += [(title, part) for part in parts]
    if is_split:
        charts = [(_of_one(title, name, wanted), [name]) for title, wanted in charts for name in wanted]
    units = {name: known.unit for name in names if (known := metric(name)) is not None}
    return [
        {"title": title, "names": wanted, "unit": units.get(wanted[0], ""), "band": _BANDS.get(wanted[0], "")}
        for title, wanted in charts
        if wanted
    ]


def _of_one(title: str, name: str, names: Sequence[str]) -> str:
    """Return the title of a chart of one of some metrics."""
    if {name.removeprefix("eval/"), f"eval/{name.removeprefix('eval/')}"} <= set(names):  # in training, and held out
        return f"{title}, held out" if name.startswith("eval/") else title
    return f"{title}: {name}" if len(names) > 1 else title


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _MARK in file.read(1000)
    except OSError:
        return False
