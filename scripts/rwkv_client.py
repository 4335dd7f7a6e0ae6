"""Answer a task's held-out problems with the `rwkv` package: a judge that shares no code with the engine here.

    python scripts/rwkv_client.py MODEL.pth --task countdown_mini --size 300 --out answers.json
    python scripts/rwkv_client.py BASE.pth --state RUN/MODEL-state.pth --task countdown_mini --out answers.json

Greedy, one sequence at a time, cpu fp32. Of this project only the tokenizer and the task's prompt and scorer are used.
The problems are the last ones of the split: training evaluates on the first ones to choose its best weights.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rwkv_es.engine.stops import cut, make_stops
from rwkv_es.pretrained.tokenizer import load_tokenizer
from rwkv_es.task.task import load_task
from rwkv_es.task.templates import render, response_prefix

Answer = dict[str, Any]


def main() -> int:
    """Write every answer and the accuracy to a JSON file."""
    options = _parse()
    task = load_task(options.task, options.data)
    size = len(task.problems("test"))
    places = range(max(size - options.size, 0), size)
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        model = (options.model, options.state)
        jobs = [pool.submit(answer, model, options.task, options.data, place) for place in places]
        answers = []
        for number, job in enumerate(jobs, 1):
            answers.append(job.result())
            if number % 50 == 0 or number == len(jobs):
                print(f"  {number}/{len(jobs)} answered", file=sys.stderr)
    accuracy = sum(row["reward"] >= 1 for row in answers) / len(answers)
    Path(options.out).write_text(json.dumps({"accuracy": accuracy, "answers": answers}))
    return 0


def answer(model: tuple[str, str], task_name: str, data: str, place: int) -> Answer:
    """Answer the problem at a place of the test split; model: a checkpoint, and a file with an initial state or ""."""
    task = load_task(task_name, data)
    problem = task.problems("test")[place]
    text = response_prefix(task.template) + _complete(
        model, render(task.template, problem.prompt), task.stop, task.max_new_tokens
    )
    return {"prompt": problem.prompt, "text": text, "reward": task.reward(problem, text) or 0.0}


def _complete(model: tuple[str, str], prompt: str, stop: tuple[str, ...], max_new_tokens: int) -> str:
    """Decode greedily until the end token, a stop string or `max_new_tokens` tokens."""
    client, tokenizer, start = _load(*model)
    stops = make_stops(tokenizer, stop)
    logits, state = client.forward(tokenizer.encode(prompt), [part.clone() for part in start])
    written: list[int] = []
    while len(written) < max_new_tokens:
        written.append(int(logits[: tokenizer.n_vocab].argmax()))
        if written[-1] == tokenizer.end_id or (stops.can_end[written[-1]] and stops.hit(written)):
            break
        logits, state = client.forward([written[-1]], state)
    return cut(tokenizer.decode(written), stop)


@lru_cache(maxsize=1)
def _load(model: str, state: str) -> tuple[Any, Any, list[Any]]:
    """Load a checkpoint into the `rwkv` package, once per process; also the state that texts start from."""
    os.environ["RWKV_V7_ON"] = "1"
    import torch
    from rwkv.model import RWKV_x070

    torch.set_num_threads(1)
    path = Path(model)
    client = RWKV_x070(model=str(path.with_name(path.name.removesuffix(".pth"))), strategy="cpu fp32")
    start = client.generate_zero_state()
    for name, tensor in (torch.load(state, weights_only=True) if state else {}).items():
        start[3 * int(name.split(".")[1]) + 1] = tensor.float()  # blocks.N.att.time_state: the wkv state of layer N
    return client, load_tokenizer("auto", path, client.args.vocab_size), start


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint in the official .pth layout")
    parser.add_argument("--state", default="", help="file with an initial state (blocks.*.att.time_state)")
    parser.add_argument("--task", default="countdown_mini")
    parser.add_argument("--data", default="")
    parser.add_argument("--size", type=int, default=300, help="held-out problems")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--out", required=True, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
