"""What the host does beside a GPU: the token loop with an engine that computes nothing, CPU milliseconds a tick.

    python scripts/bench_gpu_host.py [--slots 1024] [--samples 1] [--new 300]

Texts are random words of the World vocabulary with lognormal lengths, ended by the end token or by a stop string, which
is looked for late; prompts have 60 to 180 tokens. The device's part, numpy here, is timed by itself and taken off.
`told` is what the host does with what has ended: it decodes the texts and hands them to a reward worker.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rwkv_es.engine import gpu_loop
from rwkv_es.engine.decoding import Completion, GenerationConfig
from rwkv_es.engine.gpu_loop import Loop, counts_of
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.engine.stops import Stops, make_stops
from rwkv_es.gpu.loop_kernels import NOTHING
from rwkv_es.gpu.slots import Entry, Part, columns
from rwkv_es.pretrained.tokenizer import END_ID, WorldTokenizer
from rwkv_es.reward.adapters import Answer
from rwkv_es.reward.pool import RewardPool
from rwkv_es.task.mixture import load_tasks


class Nothing:
    """A device that knows where every row is, and writes what was drawn for its request."""

    def __init__(self, texts: np.ndarray, slots: int) -> None:
        self.texts, self.seconds = texts, 0.0
        self.request, self.position, self.length, self.limit = np.zeros((4, slots), np.int64)
        self.live, self.ring = np.zeros(slots, bool), [np.zeros(slots, np.int32) for _ in range(gpu_loop.AHEAD + 1)]
        self.num_ticks = self.num_live = 0

    def read(self, parts: Sequence[Part]) -> None:
        """Count what is read at once."""
        start = time.thread_time()
        for place, count, lives in parts:
            self.position[place] += count
            self.live[place] = lives
        self.seconds += time.thread_time() - start

    def tick(self, count: int) -> int:
        """Count one token read in every slot."""
        start = time.thread_time()
        heard = self.ring[self.num_ticks % len(self.ring)]
        heard[:] = NOTHING
        rows = np.flatnonzero(self.live[:count])
        self.position[rows] += 1
        place = self.position[rows] - self.length[rows]
        rows, place = rows[place >= 0], place[place >= 0]
        heard[rows] = self.texts[self.request[rows], place]
        self.live[rows] = (heard[rows] != END_ID) & (place + 1 < self.limit[rows])
        self.num_live += len(rows)
        self.num_ticks += 1
        self.seconds += time.thread_time() - start
        return self.num_ticks - 1

    def listen(self, tick: int, count: int) -> np.ndarray:
        """Return what a tick has written."""
        return self.ring[tick % len(self.ring)][:count]

    def admit(self, entries: Sequence[Entry], stopped: Sequence[int]) -> None:
        """Put requests where they go; what would be sent to a GPU is laid out."""
        columns(entries, stopped, 180, None)
        for place, request, num_read, _ in entries:
            self.request[place], self.position[place] = request.id, num_read
            self.length[place], self.limit[place] = len(request.prompt), request.max_new_tokens
            self.live[place] = num_read + 1 >= len(request.prompt)
        self.live[list(stopped)] = False

    def save(self, places: Sequence[tuple[int, int]]) -> None:
        """Do nothing."""

    def move(self, places: Sequence[tuple[int, int]]) -> None:
        """Move rows."""
        start, end = np.array(places).T
        for column in (self.request, self.position, self.length, self.limit, self.live):
            column[end] = column[start]
        self.live[start] = False


def measured(slots: int, samples: int, most_new: int, num_requests: int) -> dict[str, float]:
    """Run a rollout and return what the host took."""
    rng = np.random.default_rng(0)
    stops = make_stops(WorldTokenizer(), ["\n\nUser:", "</answer>"])
    requests = [
        Request(member, p, tuple(rng.integers(1, 60000, rng.integers(60, 180)).tolist()), most_new, k, id=0)
        for member in range(num_requests // samples // 8)
        for p in range(8)
        for k in [0]
    ]
    requests = [r._replace(sample=k) for r in requests for k in range(samples)]
    requests = [r._replace(id=i) for i, r in enumerate(with_shared_prefixes(requests))]
    device = Nothing(texts_of(rng, len(requests), most_new, stops), slots)
    loop = Loop(device, requests, GenerationConfig(stops, slots=slots), counts_of(slots, 8))
    told, tell, pool = 0.0, *teller(requests)
    # After every tick: when, how long all else took so far, whether the ticks go over all slots.
    marks: list[tuple[float, float, bool]] = []

    def on_finished(ended: Mapping[int, Completion]) -> None:
        nonlocal told
        start = time.thread_time()
        tell(ended)
        told += time.thread_time() - start
        marks.append((time.thread_time(), device.seconds + told, loop.count == slots))

    with pool:
        found = loop.run(on_finished)
    lasted = [(b[0] - a[0]) - (b[1] - a[1]) for a, b in itertools.pairwise(marks)]
    full = [seconds for seconds, mark in zip(lasted, marks) if mark[2]]
    return {
        "slots": slots,
        "samples": samples,
        "ticks": device.num_ticks,
        "readings": found.num_ticks - device.num_ticks,
        "requests": len(requests),
        "mean_new": sum(len(c.tokens) for c in found.completions) / len(requests),
        "stopped_by_string": sum(c.finish == "stop" and c.tokens[-1] != END_ID for c in found.completions),
        "device_ms_per_tick": 1e3 * device.seconds / device.num_ticks,
        "full_ticks": len(full),
        "host_ms_per_full_tick": 1e3 * sum(full) / max(len(full), 1),
        "host_ms_per_tick": 1e3 * sum(lasted) / len(lasted),
        "told_ms_per_tick": 1e3 * told / len(lasted),
    }


def teller(requests: Sequence[Request]) -> tuple[Callable[[Mapping[int, Completion]], None], RewardPool]:
    """Return what a rollout of `session.answer` does with what has ended, and the workers that score it."""
    tokenizer, problems = WorldTokenizer(), list(load_tasks("countdown").problems("train")[:8])  # as a step has them
    pool = RewardPool("countdown", "", 1, 10.0, 1.0)

    def tell(ended: Mapping[int, Completion]) -> None:
        for place, completion in ended.items():
            text, request = tokenizer.decode(completion.tokens), requests[place]
            pool.submit(place, Answer(problems[request.problem], text, completion.tokens, 0))
        pool.poll()

    return tell, pool


def texts_of(rng: np.random.Generator, count: int, most: int, stops: Stops) -> np.ndarray:
    """Return words (count,most): after a lognormal length the end token, or a stop string."""
    words = rng.integers(1, 60000, (count, most)).astype(np.int32)
    string = WorldTokenizer().encode("\n\nUser:")
    for row, length in zip(words, np.minimum(rng.lognormal(np.log(0.35 * most), 0.6, count), most - 8).astype(int)):
        row[length : length + len(string)] = string if rng.random() < 0.5 else [END_ID] * len(string)
    assert all(token < len(stops.can_end) for token in words.max(0))
    return words


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--new", type=int, default=800)
    parser.add_argument("--requests", type=int, default=4096)
    options = parser.parse_args()
    print(json.dumps(measured(options.slots, options.samples, options.new, options.requests)))


if __name__ == "__main__":
    main()
