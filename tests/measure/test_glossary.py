"""The reference of metrics: all that a run writes is in it, and trackers get names in groups."""

import json

from small_runs import run

from rwkv_es.measure.glossary import METRICS, grouped, metric


def test_every_number_that_a_run_writes_is_explained(tmp_path):
    folder = run(tmp_path / "run", steps=2)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert {"time", "elapsed_s", "sigma", "lr", "tokens_per_s", "peak_memory_bytes", "distance_from_base"} <= names
    assert [name for name in names if metric(name) is None] == []
    steps = [row for row in rows if "reward_mean" in row]
    assert steps[0]["tokens_per_s"] == steps[0]["tokens_read"] / steps[0]["generate_s"]
    assert [row["sigma"] for row in steps] == [0.02, 0.02] and [row["lr"] for row in steps] == [0.02, 0.002]
    assert 50e6 < steps[0]["peak_memory_bytes"] < 50e9
    evaluations = [row["distance_from_base"] for row in rows if "eval/reward" in row]
    assert evaluations[0] == 0 < evaluations[-1]


def test_numbers_are_grouped_by_a_slash_once():
    metrics = {
        "reward_mean": 0.5,
        "eval/reward": 0.25,
        "log/chars": 3.0,
        "lr": 1e-3,
        "wait_s_of_rank_3": 1.0,
        "mine": 2,
    }
    assert grouped(metrics) == {
        **{"train/reward_mean": 0.5, "eval/reward": 0.25, "log/chars": 3.0, "update/lr": 1e-3},
        **{"waiting/wait_s_of_rank_3": 1.0, "mine": 2},
    }


def test_no_metric_is_explained_twice_or_without_words():
    names = [known.name for known in METRICS]
    assert len(names) == len(set(names)) and all(known.meaning for known in METRICS)
