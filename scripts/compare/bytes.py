"""Equal bytes: how many answers of one length each method has in flight in the memory that GRPO takes for a few.

Measured is the peak of a process of its own while it takes a step, above what it held when it began; predicted is a
closed form. GRPO reads all of a step's answers backwards in one pass, and for comparison one at a time. Peaks are those
of processes that give back what is free, which helps GRPO and slows it; seconds are those of processes that do not.
"""

import ctypes
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from rwkv7_sequence import HEAD, init_params

from rwkv_es.engine.memory import Load, needed, state_bytes, targets_of
from rwkv_es.engine.stops import Stops
from rwkv_es.model.layout import Params

from .gradients import optimiser, read, rows, step_, trainable
from .methods import METHODS
from .race import in_child, resident
from .records import Record
from .world import Answered, Asked, World, answer

GRADIENTS, MEMBERS = ("grpo", "dr_grpo", "ppo"), ("ours", "eggroll")
ONE_BY_ONE = "grpo, one answer at a time backwards"
PROMPTS = 8  # of a member; of a group: samples
UNIT = 2 * PROMPTS  # of answers in flight: a mirrored pair's
PROBES = (16, 128)  # answers in flight, from which the number that fits is extrapolated
TRIES, MOST = 4, 8192
MMAP_THRESHOLD, LEAST_MAPPED = -3, 1 << 14  # mallopt's M_MMAP_THRESHOLD; bytes
HEADER = (
    "| method | answers in flight | peak MB, measured | peak MB, predicted | times GRPO's | CPU s of a step |\n"
    "|---|---|---|---|---|---|"
)
STEPS = dict.fromkeys(GRADIENTS, 2)  # from the second on AdamW holds its moments
VECTORS = {"es_at_scale": 7, "openai_es": 72, "genetic": 134, "random_search": 97}  # of all entries, held at once


class Long(NamedTuple):
    """A task whose answers end at a length; what they earn is not looked at."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_included: tuple[str, ...] = ()

    def reward(self, problem: object, text: str) -> float:
        """Pay nothing."""
        return 0.0


def lengthened(world: World, length: int) -> World:
    """Return a world in which every answer has `length` tokens."""
    stops = world.decoding.stops
    never = Stops(-1, (), np.zeros_like(stops.can_end), stops.token_bytes)
    return world._replace(task=Long(length), decoding=world.decoding._replace(stops=never))


def settings_of(name: str, in_flight: int, length: int) -> dict[str, Any]:
    """Return settings under which so many answers are in flight: of GRPO and PPO, in one pass backwards."""
    method = METHODS[_key(name)]
    own: dict[str, Any] = {**method.DEFAULTS, **method.GRID[0]}
    if name in MEMBERS:
        return own | {"population": in_flight // PROMPTS, "prompts": PROMPTS}
    if name == "ppo":
        own |= {"prompts": in_flight}
    elif name.startswith(("grpo", "dr_grpo")):
        own |= {"prompts": in_flight // PROMPTS, "samples": PROMPTS}
    else:
        return own | {"prompts": in_flight}
    return own | {"row_tokens": 1 if name == ONE_BY_ONE else 2 * length * in_flight}


def _key(name: str) -> str:
    return name.split(",", maxsplit=1)[0]


def peak_of(world: World, name: str, in_flight: int, length: int) -> Record:
    """Take a step in a process of its own that gives back what is free; return the peak of its memory."""
    record = in_child(lambda: _steps(lengthened(world, length), name, in_flight, length), return_memory_)[-1]
    return {"method": name, "in_flight": in_flight, "length": length, "peak_bytes": record["peak_bytes"]}


def seconds_of(world: World, name: str, in_flight: int, length: int) -> float:
    """Take a step in a process of its own; return its CPU time."""
    return in_child(lambda: _steps(lengthened(world, length), name, in_flight, length))[-1]["cpu_s"]


def return_memory_() -> None:
    """Have glibc give back what is free and what will be, in this process.

    By default it keeps blocks smaller than the largest that was freed so far: what autograd frees between what it keeps
    makes a pass cost half as much again. A forked process would also use, uncounted, what its parent has freed.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, LEAST_MAPPED)
    libc.malloc_trim(0)


def _steps(world: World, name: str, in_flight: int, length: int) -> Iterator[Record]:
    """Take a step, of gradients two; of whole models that answer one after the other two do so, as all would."""
    key, settings = _key(name), settings_of(name, in_flight, length)
    method, began = METHODS[key], time.process_time()
    slots = -(-in_flight // 8) * 8
    world = world._replace(decoding=world.decoding._replace(slots=slots))
    problems = [world.train[i % len(world.train)] for i in range(settings["prompts"])]
    state = method.start(world.model, settings, 0)
    for _ in range(STEPS.get(key, 1)):
        answered = answer(world, _two_of(method.ask(state)), problems)
        assert answered.num_tokens >= length
        state = method.tell(state, _rewarded(answered, settings))
    yield {"cpu_s": time.process_time() - began}


def _two_of(asked: Asked) -> Asked:
    return asked._replace(candidates=islice(asked.candidates, 2))


def _rewarded(answered: Answered, settings: Mapping[str, Any]) -> Answered:
    """Pay every other answer, so that all of them are learned from."""
    rows = settings.get("population", settings["prompts"])
    columns = settings["prompts"] if "population" in settings else settings["samples"]
    pays = torch.arange(rows)[:, None] + torch.arange(columns) if "population" in settings else torch.arange(columns)
    return answered._replace(rewards=(pays % 2).double().expand(rows, columns))


def predicted(world: World, name: str, in_flight: int, length: int) -> int | None:
    """Return the peak in closed form; None: there is none here (CMA-ES: that of its package)."""
    entries = sum(tensor.numel() for tensor in world.model.params.values())
    load = Load(in_flight, in_flight // PROMPTS)
    states = in_flight * state_bytes(world.model.arch, load)
    if name in MEMBERS:
        targets = targets_of(world.model.arch, settings_of(name, in_flight, length)["targets"], 1)
        memory = needed(world.model.arch, targets, load)
        return memory.weights + memory.factors + max(memory.generating, memory.update)
    if name in VECTORS:
        return 4 * VECTORS[name] * entries + states
    if name.startswith(GRADIENTS):  # weights, gradient, two moments; the texts' activations, or the step's own copy
        in_pass = 1 if name == ONE_BY_ONE else in_flight
        prompt = max(len(world.tokenizer.encode(problem.prompt)) for problem in world.train[:in_flight])
        return 4 * 4 * entries + max(states, in_pass * activations(world.model.params, prompt + length), 4 * entries)
    return None


def activations(params: Params, length: int) -> int:
    """Count what a pass over one text of so many tokens, padded as texts are, keeps for the way back, in bytes."""
    policy = trainable(params)
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read(policy, next(rows(Answered(torch.zeros(1), [(1,)], [[1] * (length - 1)]), [0])))
    weights = {tensor.untyped_storage().data_ptr() for tensor in policy.values()}
    return sum(storage.nbytes() for place, storage in held.items() if place not in weights)


def floor_of(world: World, length: int, name: str) -> int:
    """Measure what a process still holds after the base has answered a problem, mostly code that is first used then.

    A method with gradients has taken one, too, of a model of one layer.
    """
    settings: dict[str, Any] = {"lr": 0.0}

    def work() -> Iterator[Record]:
        before = resident()
        answer(lengthened(world, length), Asked(model=world.model), world.train[:1])
        if name.startswith(GRADIENTS):
            policy = trainable(init_params(1, HEAD, 2, HEAD, 0))
            likelihood, _ = read(policy, next(rows(Answered(torch.zeros(1), [(1,)], [[1]]), [0])))
            likelihood.sum().backward()
            step_(optimiser(list(policy.values()), settings), settings, 0.0)
            del policy, likelihood
        gc.collect()
        yield {"held": resident() - before}

    return in_child(work, return_memory_)[0]["held"]


def compare(world: World, in_pass: int, length: int, methods: Sequence[str]) -> str:
    """Measure GRPO's peak with `in_pass` answers in one pass, and what every method fits into it; return a table."""
    grpo = peak_of(world, "grpo", in_pass, length)
    found = [grpo]
    print(grpo, flush=True)
    for name in [*(name for name in methods if name != "grpo"), ONE_BY_ONE]:
        found.append(fitting(world, name, grpo["peak_bytes"], length))
        print(found[-1], flush=True)
    found.sort(key=lambda record: -record["in_flight"])
    return "\n".join([HEADER, *(line(world, record, in_pass) for record in found)])


def fitting(world: World, name: str, budget: int, length: int) -> Record:
    """Return the run with the most answers in flight within a budget of bytes, or one with 0 of them if none does."""
    few, many = (peak_of(world, name, count, length) for count in PROBES)
    slope = max(1.0, (many["peak_bytes"] - few["peak_bytes"]) / (PROBES[1] - PROBES[0]))
    count, best = PROBES[0] + int((budget - few["peak_bytes"]) / slope), few
    for _ in range(TRIES):
        count = min(count // UNIT * UNIT, MOST)
        if count < UNIT:
            break
        best = peak_of(world, name, count, length)
        if best["peak_bytes"] <= budget:
            return best
        count -= int((best["peak_bytes"] - budget) / slope) + UNIT
    return best | {"in_flight": 0, "least": best["in_flight"]}


def line(world: World, record: Record, in_pass: int) -> str:
    """Return a method's row; to what is predicted the process itself is added, as measured."""
    name, count = record["method"], record["in_flight"]
    tried = count or record["least"]
    guess = predicted(world, name, tried, record["length"])
    cells = [
        name,
        str(count) if count else f"none: with {tried} it takes the next column",
        f"{record['peak_bytes'] / 1e6:.0f}",
        "–" if guess is None else f"{(floor_of(world, record['length'], name) + guess) / 1e6:.0f}",
        f"{count / in_pass:.0f}" if count else "–",
        f"{seconds_of(world, name, tried, record['length']):.1f}",
    ]
    return f"| {' | '.join(cells)} |"
