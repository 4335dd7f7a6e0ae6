"""What turns cost: episodes whose environment thinks for 50 ms a turn, against answers of one turn and as many tokens.

    python scripts/bench_turns.py
    python scripts/bench_turns.py --models 1m 5m 25m 0.1b

Both read and sample the same numbers of tokens per row, with the embedded sister model or random weights of the
official layout. Prints one JSON line for each model: the median tokens per second of wall-clock time, and per second of
this process's CPU, how much more of both turns take, and the microseconds of CPU that a turn adds.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from bench import random_model

import rwkv_es
from rwkv_es.config.options import build
from rwkv_es.model.vocabulary import END_ID
from rwkv_es.pretrained.tokenizer import WORLD_HEAD
from rwkv_es.session import Session, answer, open_environments, open_session
from rwkv_es.task.task import load_task

TASK = """
import time
from rwkv_es.task import Done, Problem
VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE, MAX_TURNS = "1", (), {answer}, "raw", {turns}

def problems(split, data=""):
    return [Problem(f"{{i % 101}}:{{i // 101}}:", "", {{"i": i}}) for i in range({episodes})]
"""
ENVIRONMENT = """
def environment(problem):
    answer = yield
    for _ in range({turns} - 1):
        time.sleep({seconds})
        answer = yield "+\\n" * ({reply} // 2)
    return Done(1.0)
"""
PLAIN = """
def problems(split, data=""):
    replies = "+\\n" * ({reply} // 2 * ({turns} - 1))
    return [Problem(f"{{i % 101}}:{{i // 101}}:{{replies}}", "") for i in range({episodes})]

def reward(problem, text):
    return 1.0
"""


class Size(NamedTuple):
    """A model and a load that takes seconds."""

    layers: int
    dim: int
    vocab: int
    episodes: int
    slots: int
    turns: int


SIZES = {
    "tiny-guess": Size(3, 64, 115, 1024, 256, 20),  # the embedded one
    "1m": Size(4, 128, 115, 512, 256, 10),
    "5m": Size(6, 256, 115, 256, 128, 10),
    "25m": Size(8, 512, 115, 128, 64, 6),
    "0.1b": Size(12, 768, WORLD_HEAD, 48, 24, 4),
}


def main() -> None:
    """Measure all models, and print the results."""
    options = parse()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"model": name, **compared(name, options, Path(folder))}), flush=True)


def compared(name: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Measure a model's turns, and one turn of as many tokens."""
    size = SIZES[name]
    sizes = vars(options) | size._asdict() | {"seconds": options.milliseconds / 1000}
    turns, plain = folder / "turns.py", folder / "plain.py"
    turns.write_text((TASK + ENVIRONMENT).format(**sizes))
    plain.write_text((TASK + PLAIN).format(**{**sizes, "answer": options.answer * size.turns}))
    model = name if name == "tiny-guess" else random_checkpoint(folder / "random.pth", size)
    seconds: dict[str, list[tuple[float, float]]] = {"turns": [], "plain": []}
    num_read: dict[str, int] = {}
    with ExitStack() as stack:
        sessions = {path.stem: stack.enter_context(opened(path, model, size.slots)) for path in (turns, plain)}
        for kind, session in sessions.items():
            num_read[kind] = measure(session)[2]  # kernels, processes
        assert num_read["turns"] == num_read["plain"], num_read
        for _ in range(options.repeats):  # one after the other, so that both meet what else the machine does
            for kind, session in sessions.items():
                seconds[kind].append(measure(session)[:2])
    slower = [[b / a - 1 for a, b in zip(*pair)] for pair in zip(seconds["plain"], seconds["turns"])]
    medians = {kind: [median(column) for column in zip(*values)] for kind, values in seconds.items()}
    added = medians["turns"][1] - medians["plain"][1]
    return {
        "tokens_read": num_read["turns"],
        "tokens_per_s, per_cpu_s": {
            kind: [round(num_read[kind] / each) for each in values] for kind, values in medians.items()
        },
        "turns take longer, on the clock and in CPU seconds": [f"{median(column):.1%}" for column in zip(*slower)],
        "CPU_us_per_turn": round(1e6 * added / (size.episodes * size.turns)),
        "options": vars(options) | size._asdict(),
    }


@contextmanager
def opened(path: Path, model: str, slots: int) -> Iterator[Session]:
    """Open a session on a task's file."""
    options = {"model": model, "task": str(path), "slots": slots, "device": "cpu", "dtype": "fp32"}
    config = build(options, "train")
    with open_environments(config, open_session(config, load_task(str(path)))) as session:
        yield session


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    parser.add_argument("--models", nargs="+", choices=SIZES, default=["tiny-guess"])

    def add(name: str, default: int, meaning: str) -> None:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")

    add("answer", 8, "tokens of an answer")
    add("reply", 4, "tokens of a reply, even")
    add("milliseconds", 50, "of thinking per turn")
    add("repeats", 7, "measurements of each")
    return parser.parse_args()


def measure(session: Session) -> tuple[float, float, int]:
    """Return seconds on the clock and of this process's CPU, and how many tokens were read."""
    problems = session.task.problems("train")
    wall, cpu = time.perf_counter(), time.process_time()
    found = answer(session, problems).rollout
    return time.perf_counter() - wall, time.process_time() - cpu, found.num_read


def random_checkpoint(path: Path, size: Size) -> str:
    """Write a model of random weights that does not say the end token, with its tokenizer. Returns its path."""
    params = random_model(size.layers, size.dim, size.vocab).params
    params["ln_out.bias"][0], params["head.weight"][:, 0], params["head.weight"][END_ID, 0] = 10.0, 0.0, -100.0
    torch.save(params, path)
    if size.vocab != WORLD_HEAD:
        tokenizer = path.with_name(f"{path.stem}.tokenizer.json")
        shutil.copy(Path(rwkv_es.__file__).parent / "tiny/rwkv7-tiny-guess.tokenizer.json", tokenizer)
    return str(path)


if __name__ == "__main__":
    main()
