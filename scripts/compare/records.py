"""Records of runs: one JSON object a line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEYS = ("task", "phase", "method", "settings", "seed", "budget", "amount", "control")


def read_records(folder: Path) -> list[Record]:
    """Read a folder's records."""
    path = folder / "records.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_done(records: Sequence[Record], head: Mapping[str, Any]) -> bool:
    """Say whether a run that began so has ended."""
    wanted = json.loads(json.dumps(head))
    return any(record["is_last"] and all(record[key] == wanted[key] for key in KEYS) for record in records)


def best_settings(records: Sequence[Record], task: str, method: str) -> Mapping[str, Any]:
    """Return the settings of the sweep that learned most: by the mean of the last accuracy and the curve's mean."""
    own = [r for r in records if (r["phase"], r["task"], r["method"]) == ("sweep", task, method)]
    runs: dict[str, list[Record]] = {}
    for record in own:
        runs.setdefault(json.dumps(record["settings"]), []).append(record)

    def score(key: str) -> float:
        curve = [record["accuracy"] for record in runs[key]]
        return (curve[-1] + sum(curve) / len(curve)) / 2

    return json.loads(max(runs, key=score))


def final_runs(records: Sequence[Record], task: str, control: str = "none") -> dict[str, list[list[Record]]]:
    """Group the final records of a task: method -> runs -> records in order."""
    runs: dict[str, dict[int, list[Record]]] = {}
    for record in records:
        if (record["phase"], record["task"], record["control"]) == ("final", task, control):
            runs.setdefault(record["method"], {}).setdefault(record["seed"], []).append(record)
    return {method: list(by_seed.values()) for method, by_seed in runs.items()}
