"""What turns cost: episodes whose environment thinks for 50 ms a turn, against answers of one turn and as many tokens.

    python scripts/bench_turns.py

Both read and sample the same numbers of tokens per row with the embedded sister model. Prints one JSON line: the median
tokens per second of wall-clock time, and per second of this process's CPU, and how much more of both turns take.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from rwkv_es.config.options import build
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


def main() -> None:
    """Measure both, and print the result."""
    options = parse()
    sizes = vars(options) | {"seconds": options.milliseconds / 1000}
    head = TASK.partition("def problems")[0].format(**sizes)
    problems = TASK[TASK.index("def problems") :].format(**sizes)
    with tempfile.TemporaryDirectory() as folder:
        turns, plain = Path(folder, "turns.py"), Path(folder, "plain.py")
        turns.write_text(head + problems + ENVIRONMENT.format(**sizes))
        single = TASK.partition("def problems")[0].format(**{**sizes, "answer": options.answer * options.turns})
        plain.write_text(single + PLAIN.format(**sizes))
        found: dict[str, list[tuple[float, float]]] = {"turns": [], "plain": []}
        num_read = {}
        with ExitStack() as stack:
            sessions = {path.stem: stack.enter_context(opened(path, options.slots)) for path in (turns, plain)}
            for session in sessions.values():
                measure(session)  # kernels, processes
            for _ in range(options.repeats):  # one after the other, so that both meet what else the machine does
                for name, session in sessions.items():
                    *rates, num_read[name] = measure(session)
                    found[name].append((rates[0], rates[1]))
    medians = {name: [round(median(column)) for column in zip(*values)] for name, values in found.items()}
    slower = [[b / a - 1 for a, b in zip(*pair)] for pair in zip(found["turns"], found["plain"])]
    result = {
        "tokens_read": num_read,
        "tokens_per_s, per_cpu_s": medians,
        "turns take longer, on the clock and in CPU seconds": [f"{median(column):.1%}" for column in zip(*slower)],
        "options": vars(options),
    }
    print(json.dumps(result))


@contextmanager
def opened(path: Path, slots: int) -> Iterator[Session]:
    """Open a session on a task's file."""
    config = build({"model": "tiny-guess", "task": str(path), "slots": slots, "device": "cpu"}, "train")
    with open_environments(config, open_session(config, load_task(str(path)))) as session:
        yield session


def parse() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, default: int, meaning: str) -> None:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")

    add("episodes", 1024, "episodes at a time")
    add("slots", 256, "generations in flight")
    add("turns", 20, "answers in an episode")
    add("answer", 8, "tokens of an answer")
    add("reply", 4, "tokens of a reply, even")
    add("milliseconds", 50, "of thinking per turn")
    add("repeats", 7, "measurements of each")
    return parser.parse_args()


def measure(session: Session) -> tuple[float, float, int]:
    """Return tokens read per second, per second of this process's CPU, and how many were read."""
    problems = session.task.problems("train")
    wall, cpu = time.perf_counter(), time.process_time()
    found = answer(session, problems).rollout
    return found.num_read / (time.perf_counter() - wall), found.num_read / (time.process_time() - cpu), found.num_read


if __name__ == "__main__":
    main()
