"""Folders that look like runs, without any training."""

import json

OPTIONS = "task: copy & paste\nmodel: tiny\nsteps: 4\nlr: 0.001\nmade_with:\n  torch: 2.13.0\n  base: base.pth\n"


def write_run(folder, metrics=(), samples=(), options=OPTIONS):
    """Write a run folder with such lines of metrics.jsonl and samples.jsonl."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.yaml").write_text(options)
    (folder / "ledger.jsonl").touch()
    (folder / ".rwkv-es-made.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def rising(num_steps, slope=0.1):
    """Return the metrics of a run that gets better: evaluations before and after, a line a step."""
    rows = [{"step": 0, "time": 1e9, "elapsed_s": 1.0, "eval/reward": 0.1, "eval/accuracy": 0.1}]
    for step in range(1, num_steps + 1):
        numbers = {"reward_mean": slope * step, "reward_std_of_members": 0.05, "tokens_read": 1000.0, "sigma": 0.01}
        laps = {"generate_s": 2.0, "score_s": 0.25, "wait_s": 0.25, "update_s": 0.5, "tokens_per_s": 500.0, "lr": 0.001}
        answers = {"tokens_per_answer": 20.0, "step_rms_per_sigma": 0.1, "peak_memory_bytes": 500_000_000}
        rows.append({"step": step, "time": 1e9 + 3 * step, "elapsed_s": 1 + 3.0 * step, **numbers, **laps, **answers})
    return [*rows, {"step": num_steps, "elapsed_s": 3.0 * num_steps + 2, "eval/reward": 0.75, "eval/accuracy": 0.75}]
