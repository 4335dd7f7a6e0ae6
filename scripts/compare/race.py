"""One run of one method under a budget, with what it costs and what it reaches."""

import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_es.measure.statistics import pass_at_k
from rwkv_es.model.layout import Params
from rwkv_es.task import Problem

from .methods import METHODS
from .world import Answered, Asked, World, answer

NUM_POINTS = 8  # of a curve, unless an entry says otherwise; half as many in a sweep
SWEEP_SEED = 1000  # seeds from here on are those of sweeps
CONTROLS = ("none", "reversed", "shuffled")


class Entry(NamedTuple):
    """What is run."""

    method: str
    settings: Mapping[str, Any]
    seed: int
    budget: str  # "cpu-seconds" or "generations"
    amount: float
    control: str = "none"
    points: int = NUM_POINTS


class Cost(NamedTuple):
    """What was spent so far; judging is not counted."""

    cpu_s: float = 0.0
    generations: int = 0
    tokens: int = 0
    steps: int = 0


def run(world: World, entry: Entry, problems: Sequence[Problem]) -> Iterator[dict[str, Any]]:
    """Run it; yield a record at the start, at its points along the budget and at the end, judged on `problems`."""
    method, is_sweep = METHODS[entry.method], entry.seed >= SWEEP_SEED
    interval = entry.amount / entry.points * (2 if is_sweep else 1)
    settings = {**method.DEFAULTS, **entry.settings}
    began = time.process_time()
    state, cost, due = method.start(world.model, settings, entry.seed), Cost(), 0.0
    cost = cost._replace(cpu_s=time.process_time() - began)
    while (spent := spent_of(cost, entry.budget)) < entry.amount:
        if spent >= due:
            yield {**cost._asdict(), "accuracy": accuracy(world, method.params(state), problems)}
            due = spent + interval
        began = time.process_time()
        batch = draw(world.train, settings["prompts"], entry.seed, cost.steps)
        answered = answer(world, method.ask(state), batch, noise=1_000_003 * entry.seed + cost.steps)
        answered = controlled(answered, entry.control, cost.steps)._replace(spent=spent / entry.amount)
        state = method.tell(state, answered)
        seconds, count = time.process_time() - began, answered.rewards.numel()
        cost = Cost(cost.cpu_s + seconds, cost.generations + count, cost.tokens + answered.num_tokens, cost.steps + 1)
    final = judged_shortly if is_sweep else judged
    yield {**cost._asdict(), **final(world, method.params(state), problems)}


def spent_of(cost: Cost, budget: str) -> float:
    """Return what counts against the budget."""
    return cost.cpu_s if budget == "cpu-seconds" else cost.generations


def draw(problems: Sequence[Problem], count: int, seed: int, step: int) -> list[Problem]:
    """Return a step's problems: the same for every method with this seed, step and count."""
    order = list(range(len(problems)))
    random.Random(f"{seed}").shuffle(order)
    return [problems[order[(step * count + i) % len(order)]] for i in range(count)]


def controlled(answered: Answered, control: str, step: int) -> Answered:
    """Return the rewards as they are, negated, or in a random order among all answers."""
    rewards = answered.rewards
    if control == "reversed":
        rewards = -rewards
    elif control == "shuffled":
        flat = rewards.flatten()
        rewards = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(step))].reshape(rewards.shape)
    return answered._replace(rewards=rewards)


def judged_shortly(world: World, params: Params, problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the accuracy alone."""
    return {"accuracy": accuracy(world, params, problems)}


def accuracy(world: World, params: Params, problems: Sequence[Problem]) -> float:
    """Return the share of greedy answers that are right; of episodes: that earn all there is to earn."""
    return _rewards(world, params, problems, 1)[0].mean().item()


def judged(world: World, params: Params, problems: Sequence[Problem], samples: int = 8) -> dict[str, Any]:
    """Return accuracy, mean@k and pass@k, problems gained and lost against the base, tokens per answer."""
    greedy, tokens = _rewards(world, params, problems, 1)
    base = _rewards(world, world.model.params, problems, 1)[0]
    sampled, _ = _rewards(world, params, problems, samples)
    right = [int(row.sum()) for row in sampled]
    return {
        "accuracy": greedy.mean().item(),
        f"mean@{samples}": sampled.mean().item(),
        f"pass@{samples}": sum(pass_at_k(samples, count, samples) for count in right) / len(right),
        "gained": int((greedy > base).sum()),
        "lost": int((greedy < base).sum()),
        "tokens_per_answer": tokens,
    }


def _rewards(world: World, params: Params, problems: Sequence[Problem], samples: int) -> tuple[torch.Tensor, float]:
    model = world.model._replace(params=params)
    asked = Asked(model=model, samples=samples, temperature=0.0 if samples == 1 else 1.0)
    found = answer(world, asked, problems)
    num_tokens = sum(map(len, found.completions)) / len(found.completions)  # of episodes: with the replies
    rewards = found.rewards.reshape(len(problems), samples)
    return rewards if world.setting is None else (rewards >= 1).double(), num_tokens


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def peak() -> int:
    """Return the most that it has been."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_child(
    work: Callable[[], Iterator[dict[str, Any]]], prepare: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Do it in a forked process, so that the peak of its memory is its own; add that to the records."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        if prepare is not None:
            prepare()
        before = resident()
        sender.send([{**record, "peak_bytes": peak() - before} for record in work()])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()  # so that the death of the child is noticed
    records = receiver.recv()
    process.join()
    return records
