"""What is read of a run's folder to be shown: where it stands, its curves, its answers."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_es.config.options import PROVENANCE
from rwkv_es.run.identity import read_config
from rwkv_es.run.ledger import HELD_OUT, Best, best_weights, held_out, read_metrics
from rwkv_es.system.files import is_count, is_finite, read_sound_lines
from rwkv_es.system.lock import holder
from rwkv_es.system.texts import text_of

MOST_ROWS = 4000  # of metrics: longer runs are thinned, evaluations never
_MOST_STEPS, _MOST_EVALUATIONS, _MOST_CHARS = 150, 8, 20000  # whose answers are shown; of a text
_TAIL = 1 << 18  # bytes in which an answer of the newest step is looked for
_LAPS = ("generate_s", "score_s", "wait_s", "update_s")
_NO_CURVES = ("step", "time", "elapsed_s")


class Standing(NamedTuple):
    """Where a run stands."""

    folder: Path
    options: dict[str, Any]
    num_steps: int
    holder: str  # the process that trains in the folder; "" if none does
    best: Best | None
    before: float | None  # the held-out reward before training

    @property
    def state(self) -> str:
        """Whether it is running, finished, or has stopped before its last step."""
        return "running" if self.holder else "finished" if self.num_steps >= self.planned else "stopped"

    @property
    def planned(self) -> int:
        """The steps that the run is to take."""
        return int(self.options["steps"])


def standing_of(folder: Path, metrics: Sequence[Mapping[str, Any]] | None = None) -> Standing:
    """Look where a run stands.

    Raises:
        ConfigError: the folder holds no run, or its config.yaml is damaged.
    """
    options = read_config(folder)
    rows = read_metrics(folder) if metrics is None else metrics
    num_steps = max((row.get("step", 0) for row in rows if "reward_mean" in row), default=0)
    return Standing(folder, options, num_steps, holder(folder), best_weights(folder), held_out(folder, 0))


def run_data(folder: Path, name: str) -> dict[str, Any]:
    """Return all that the page shows of a run, under a name that tells it from others."""
    rows = read_metrics(folder)
    standing = standing_of(folder, rows)
    kept = thinned(rows)
    options, best = standing.options, standing.best
    return {
        "name": name,
        "about": f"{options.get('task', '')} · {options.get('model', '')}",
        "state": standing.state,
        "steps": standing.num_steps,
        "planned": standing.planned,
        "best": best.score if best else None,
        "best_step": best.step if best else 0,
        "before": standing.before,
        **{axis: [values[i] for i in kept] for axis, values in axes(rows).items()},
        "series": curves([rows[i] for i in kept]),
        "samples": list(chosen_samples(read_sound_lines(folder / "samples.jsonl"))),
        "options": {key: text_of(value) for key, value in options.items() if key != PROVENANCE},
    }


def axes(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return what the lines of metrics.jsonl are drawn over: steps, seconds of work, tokens read so far."""
    tokens, worked, found = 0.0, 0.0, {"step": [], "elapsed": [], "tokens": []}  # type: ignore[var-annotated]
    for row in rows:
        tokens += row.get("tokens_read") or 0
        worked = row.get("elapsed_s") or worked + sum(row.get(name) or 0 for name in _LAPS)  # the sum: older runs
        for axis, value in (("step", row.get("step", 0)), ("elapsed", worked), ("tokens", tokens)):
            found[axis].append(value)
    return found


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return every metric's finite values and the places of their rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for place, row in enumerate(rows):
        for name, value in row.items():
            if name not in _NO_CURVES and is_finite(value):
                curve = found.setdefault(name, {"at": [], "values": []})
                curve["at"].append(place)
                curve["values"].append(float(f"{value:.6g}"))
    return found


def thinned(rows: Sequence[Mapping[str, Any]], most: int = MOST_ROWS) -> list[int]:
    """Return the places of the rows to draw: evaluations, and of too many steps every so many and the last."""
    every = -(-len(rows) // most)
    last = len(rows) - 1
    return [i for i, row in enumerate(rows) if i % max(every, 1) == 0 or i == last or "eval/reward" in row]


def chosen_samples(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield answers to show: of steps spread over the run, and of the first and last evaluations."""
    rows = [row for row in rows if is_count(row.get("step", 0))]
    for kind_is_held_out, most in ((True, _MOST_EVALUATIONS), (False, _MOST_STEPS)):
        of_kind = [row for row in rows if (row.get("kind") == HELD_OUT) == kind_is_held_out]
        steps = spread(sorted({row.get("step", 0) for row in of_kind}), most)
        for row in of_kind:
            if row.get("step", 0) in steps:
                texts = {key: str(row.get(key, ""))[:_MOST_CHARS] for key in ("prompt", "completion")}
                reward = row.get("reward") if is_finite(row.get("reward")) else None
                sample = {"step": row.get("step", 0), "kind": str(row.get("kind", "middle")), "reward": reward, **texts}
                yield {**sample, "turns": turns} if (turns := turns_of(row)) else sample


def newest(folder: Path) -> Mapping[str, Any]:
    """Return the best answer of the newest step, from the end of the file; nothing if it is not there."""
    rows = read_sound_lines(folder / "samples.jsonl", _TAIL)
    return next((row for row in reversed(rows) if row.get("kind") == "best"), {})


def turns_of(row: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Return the turns of an episode: the answer, the reply and what it earned; none of what is no episode."""
    turns: Any = row.get("turns")
    found = []
    for turn in [each for each in turns if isinstance(each, Mapping)] if isinstance(turns, list) else ():
        answer, reply = (str(turn.get(name) or "")[:_MOST_CHARS] for name in ("answer", "reply"))
        found.append((answer, reply, turn["reward"] if is_finite(turn.get("reward")) else 0.0))
    return found


def spread(values: Sequence[int], most: int) -> set[int]:
    """Return at most so many of the values, evenly, with the first and the last."""
    if len(values) <= most:
        return set(values)
    return {values[i * (len(values) - 1) // (most - 1)] for i in range(most)}
