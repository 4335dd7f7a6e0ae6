"""What all methods share: the model, the task, who answers, and what comes back."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es import ES, load_model, load_task
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import examined
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.engine.stops import cut, make_stops
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.model.weights import BASE, Members
from rwkv_es.task import Problem

SLOTS = 512
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first one imports for a second: before any clock


class World(NamedTuple):
    """A base model and a task, split for tuning and for judging."""

    model: Model
    tokenizer: Any
    task: Any
    decoding: GenerationConfig
    train: Sequence[Problem]
    tune: Sequence[Problem]  # settings are chosen on them
    test: Sequence[Problem]  # seen by nobody before the end


class Asked(NamedTuple):
    """Who answers a step's problems: whole models one after the other, low-rank members, or one model's samples."""

    candidates: Iterable[Params] = ()
    members: Members = BASE
    model: Model | None = None  # whose members or samples
    samples: int = 1
    temperature: float = 0.0


class Answered(NamedTuple):
    """What came back: rewards (N,P), or (P,K) of samples, and for gradients the texts as tokens, in that order."""

    rewards: Tensor
    prompts: Sequence[tuple[int, ...]] = ()
    completions: Sequence[list[int]] = ()
    num_tokens: int = 0
    spent: float = 0.0  # share of the budget, before this step


def open_world(model: str, task: str) -> World:
    """Load both; a fifth of the training problems, 200 at most, is for tuning."""
    loaded, tokenizer = load_model(model)
    found = load_task(task)
    problems, test = found.problems("train"), found.problems("test")
    num_tune = min(200, len(problems) // 5)
    decoding = GenerationConfig(make_stops(tokenizer, (*found.stop, *found.stop_included)), slots=SLOTS)
    decoding = decoding._replace(row_multiple=examined(loaded, decoding).multiple)
    train, tune = problems[: len(problems) - num_tune], problems[len(problems) - num_tune :]
    world = World(loaded, tokenizer, found, decoding, train, tune, test)
    members = ES(loaded, population=2).ask()
    answer(world, Asked(members=members, model=loaded), problems[:1])  # compiles the kernels before any clock
    return world


def answer(world: World, asked: Asked, problems: Sequence[Problem], noise: int = 0) -> Answered:
    """Let them answer; `noise` seeds the sampling."""
    if asked.model is None:
        each = [_answer(world, Asked(model=_with(world, params)), problems, noise) for params in asked.candidates]
        return Answered(torch.cat([found.rewards for found in each]), num_tokens=sum(f.num_tokens for f in each))
    return _answer(world, asked, problems, noise)


def _answer(world: World, asked: Asked, problems: Sequence[Problem], noise: int) -> Answered:
    assert asked.model is not None
    requests = [
        Request(member, i, tuple(world.tokenizer.encode(problem.prompt)), world.task.max_new_tokens, sample)
        for member in asked.members.ids
        for i, problem in enumerate(problems)
        for sample in range(asked.samples)
    ]
    decoding = world.decoding._replace(sampling=SamplingParams(noise, asked.temperature))
    found = rollout(asked.model, with_shared_prefixes(requests), decoding, asked.members.factors)
    completions = [completion.tokens for completion in found.completions]
    texts = [cut(world.tokenizer.decode(tokens), world.task.stop, world.task.stop_included) for tokens in completions]
    scores = [world.task.reward(problems[request.problem], text) for request, text in zip(requests, texts)]
    width = len(problems) if asked.samples == 1 else asked.samples
    rewards = torch.tensor(scores, dtype=torch.float64).reshape(-1, width)
    return Answered(rewards, [request.prompt for request in requests], completions, found.num_read)


def _with(world: World, params: Params) -> Model:
    return world.model._replace(params=params)
