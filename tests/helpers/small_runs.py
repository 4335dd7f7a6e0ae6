"""Whole runs of the embedded model, small enough for seconds."""

import json

from rwkv_es.config.options import build
from rwkv_es.verbs.train import train

SMALL = {
    **{"model": "tiny", "task": "countdown_mini", "population": 8, "prompts": 4, "max_new_tokens": 40, "steps": 4},
    **{"sigma": 0.02, "lr": 0.02, "targets": {"matrices": 1.0, "head.weight": 3.0}, "schedule": "linear"},
    **{"eval_every": 2, "eval_size": 8, "snapshot_every": 2, "reward_workers": 0, "threads": 1, "tracker": "none"},
}


def run(folder, **options):
    return train(build({**SMALL, "run": str(folder), **options}))


def steps_of(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def checksums(folder):
    return [step["checksum"] for step in steps_of(folder)]
