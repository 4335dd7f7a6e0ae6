"""Measure the memory of a whole ES step: draw factors, generate, update, checksum.

    python scripts/memory_step.py model.pth --make --layers 24 --dim 2048 --ranks 96 96 64 256   # writes a random model
    python scripts/memory_step.py model.pth --dtype bf16 --master stochastic --population 8 --max-new-tokens 4
    python scripts/memory_step.py model.pth --dtype bf16 --master stochastic --quantize int8

Prints one JSON line. `peak_bytes` is the most anonymous memory (RssAnon, Linux) ever seen. The pages of the mapped
checkpoint are not counted, since the system takes them back whenever it likes; `peak_with_file_bytes` (VmHWM) counts
them. `needed_bytes` is weights + state pool + factors; `over` is how far the peak is above that, as a fraction of it.
`planned_bytes` is what `rwkv_es.engine.memory` expects beforehand; `planned_over` is how far the peak is above that.
"""

import argparse
import json
import mmap
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rwkv_es.config.options import Config
from rwkv_es.cpu import engine as cpu
from rwkv_es.engine import memory
from rwkv_es.es.strategy import ES
from rwkv_es.model.batch import MULTIPLES, padded
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import HEAD_SIZE, Arch, expected_shapes
from rwkv_es.model.weights import Factors
from rwkv_es.session import Session, answer, encode_prompt, open_session

_OF_MAKE = ("make", "layers", "dim", "vocab", "ranks")
_OF_LOAD = ("dtype", "quantize", "state_dtype", "master", "optimizer", "threads", "temperature")
_EVERY_S = 0.002
_BLOCK = 1 << 22


class Peak:
    """The most anonymous memory of this process, looked at every other millisecond."""

    def __init__(self) -> None:
        self.start = self.most = rss("RssAnon")
        self.laps: dict[str, int] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def lap(self, name: str) -> None:
        """Note the most memory since the last lap."""
        self.laps[name], self.most = max(self.most, rss("RssAnon"), self.laps.get(name, 0)), 0

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, rss("RssAnon"))
            time.sleep(_EVERY_S)


def rss(field: str) -> int:
    """Read a size from this process's status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> int:
    """Write a model, or print one JSON line about a step."""
    options = _parse()
    if options.make:
        make(options.model, options)
    else:
        print(json.dumps(take_step(options)))
    return 0


def take_step(options: argparse.Namespace) -> dict[str, Any]:
    """Take steps with a made-up fitness; return what they held and how long the last one took."""
    values = {name: value for name, value in vars(options).items() if name not in _OF_MAKE}
    config = Config(**values, slots=options.population * options.prompts)
    peak, clock, seconds = Peak(), [time.perf_counter()], {}
    cpu_s = 0.0

    def lap(name: str) -> None:
        peak.lap(name)
        clock.append(time.perf_counter())
        seconds[name] = round(clock[-1] - clock[-2], 2)

    session = never_ending(open_session(config))
    es = ES.of(config, session.model, session.base)
    lap("load")
    problems = session.task.problems("train")[: config.prompts]
    for _ in range(config.steps):
        cpu_s = time.thread_time()
        members = es.ask()
        answers = answer(session, problems, members)
        lap("generate")
        moved = es.tell(torch.linspace(-1, 1, config.population))
        lap("update")
        checked = es.checksum()
        lap("checksum")
    cpu_s = time.thread_time() - cpu_s
    held = {
        "weights_bytes": sum(map(num_bytes, [*es.model.params.values(), *es.model.scales.values()])),
        "master_bytes": sum(map(num_bytes, es.updater.master.values())),
        "state_bytes": state_bytes(es.model, padded(config.slots, MULTIPLES[0])),
        "factors_bytes": factors_bytes(members.factors),
    }
    most, needed, expected = max(peak.laps.values()), sum(held.values()), planned(config, es)
    return {
        "peak_bytes": most,
        "needed_bytes": needed,
        "over": round(most / needed - 1, 3),
        "planned_bytes": expected,
        "planned_over": round(most / expected - 1, 3),
        **held,
        "before_loading_bytes": peak.start,
        "peak_with_file_bytes": rss("VmHWM"),
        "peaks_bytes": peak.laps,
        "seconds": seconds,
        "cpu_seconds": round(cpu_s, 2),  # of this thread, in the last step
        "ticks": answers.rollout.num_ticks,
        "tokens_read": answers.rollout.num_read,
        "prompt_tokens": round(sum(len(encode_prompt(session, problem)) for problem in problems) / len(problems), 1),
        "step_rms_per_sigma": moved.step_rms_per_sigma,
        "checksum": checked,
        **values,
    }


def never_ending(session: Session) -> Session:
    """Return the session with answers that are as long as they may be, so that what they take is known."""
    parts = [
        part._replace(stops=part.stops._replace(end_id=-1, strings=(), can_end=np.zeros_like(part.stops.can_end)))
        for part in session.parts
    ]
    return session._replace(parts=tuple(parts), decoding=session.decoding._replace(stops=parts[0].stops))


def planned(config: Config, es: ES) -> int:
    """Return the peak that is expected."""
    load = memory.Load(
        slots=config.slots,
        population=config.population,
        engine=config.engine if config.engine != "auto" else "numba" if cpu.is_able(es.model, None) else "torch",
        **{name: getattr(config, name) for name in _OF_LOAD},
    )
    return memory.needed(es.model.arch, es.noise.targets, load).peak


def num_bytes(tensor: torch.Tensor) -> int:
    """Return what a tensor's values take."""
    return tensor.numel() * tensor.element_size()


def state_bytes(model: Model, rows: int) -> int:
    """Return what the recurrent state of some rows takes."""
    arch = model.arch
    shifts = 2 * arch.n_embd * model.like.element_size()
    return rows * arch.n_layer * (shifts + arch.n_head * HEAD_SIZE**2 * model.state_dtype.itemsize)


def factors_bytes(factors: Factors) -> int:
    """Return what the factors of a step take."""
    return sum(map(num_bytes, [*factors.a.values(), *factors.b.values()]))


def make(path: str, options: argparse.Namespace) -> None:
    """Write a random bf16 model of the official layout without holding it: the file is laid out, mapped and filled."""
    c = options.dim
    arch = Arch(options.layers, c, c // HEAD_SIZE, HEAD_SIZE, options.vocab, 4 * c, *options.ranks)
    shapes = expected_shapes(arch)
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path)
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    for name, tensor in torch.load(path, mmap=True, weights_only=True).items():
        is_matrix = tensor.dim() == 2 and not name.endswith("r_k")
        values = (block * tensor.shape[-1] ** -0.5 if is_matrix else 1 + 0.1 * block).bfloat16()
        for part in tensor.flatten().split(_BLOCK):
            part.copy_(values[: len(part)])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--make", action="store_true", help="write a random bf16 model there")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--ranks", type=int, nargs=4, default=(96, 96, 64, 256), help="of w, a, v and g")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--master", default="stochastic")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--state-dtype", default="fp32")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="seconds are those of the last one")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
