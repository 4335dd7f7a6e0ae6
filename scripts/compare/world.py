"""What all methods share: the model, the task, who answers, and what comes back."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es import ES, load_model, load_task
from rwkv_es.config.options import build
from rwkv_es.engine.decoding import Completion, GenerationConfig, Rollout
from rwkv_es.engine.engines import examined
from rwkv_es.engine.rollout import rollout
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.engine.stops import cut, make_stops
from rwkv_es.environment.children import Staging
from rwkv_es.environment.episodes import Episodes, begun
from rwkv_es.environment.parts import part_of_task
from rwkv_es.environment.pool import MOST_CHARS, Environments
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.model.weights import BASE, Members
from rwkv_es.task import Problem
from rwkv_es.task.prompts import Prompting
from rwkv_es.task.turns import Setting

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
    setting: Setting | None = None  # of episodes, if the task has an environment


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
    completions: Sequence[list[int]] = ()  # of episodes: with what the model has read of the replies
    is_own: Sequence[list[bool]] = ()  # of a completion's tokens: the model wrote it; (): all of them
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
    setting = part_of_task(found, tokenizer, Prompting(), build({"model": model, "task": task}, "train")).setting
    world = World(loaded, tokenizer, found, decoding, train, tune, test, setting)
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
    prompts = [tuple(world.tokenizer.encode(problem.prompt)) for problem in problems]
    requests = [
        Request(member, i, prompt, world.task.max_new_tokens, sample)
        for member in asked.members.ids
        for i, prompt in enumerate(prompts)
        for sample in range(asked.samples)
    ]
    decoding = world.decoding._replace(sampling=SamplingParams(noise, asked.temperature))
    generate = partial(rollout, asked.model, with_shared_prefixes(requests), decoding, asked.members.factors)
    answered = [problems[request.problem] for request in requests]
    width = len(problems) if asked.samples == 1 else asked.samples
    if world.setting is not None:
        return _played(world, requests, answered, generate, width=width)
    found = generate()
    completions = [completion.tokens for completion in found.completions]
    texts = [cut(world.tokenizer.decode(tokens), world.task.stop, world.task.stop_included) for tokens in completions]
    given = [(request.problem, text) for request, text in zip(requests, texts)]
    score = {(i, text): world.task.reward(problems[i], text) for i, text in set(given)}
    rewards = torch.tensor([score[each] for each in given], dtype=torch.float64).reshape(-1, width)
    return Answered(rewards, [request.prompt for request in requests], completions, num_tokens=found.num_read)


def _played(
    world: World, requests: Sequence[Request], problems: Sequence[Problem], generate: Callable[..., Rollout], width: int
) -> Answered:
    """Play episodes, their environments in this process."""
    assert world.setting is not None
    limits = world.setting.limits
    staging = Staging("", "", math.inf, math.inf, 0, MOST_CHARS * limits.tokens)
    begun_ones = begun(requests, problems, [world.setting] * len(requests))
    transcripts = Transcripts(Episodes(Environments(staging, world.task.environment), world.tokenizer, begun_ones))
    found = generate(partner=transcripts)
    played = transcripts.episodes.gather()
    places = range(len(requests))
    rewards = torch.tensor([played[place].reward or 0.0 for place in places], dtype=torch.float64).reshape(-1, width)
    tokens, is_own = ([each[place] for place in places] for each in (transcripts.tokens, transcripts.is_own))
    return Answered(rewards, [request.prompt for request in requests], tokens, is_own, found.num_read)


class Transcripts:
    """A rollout's partner that keeps what its episodes read and wrote after their prompts, in order."""

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes
        self.tokens: dict[int, list[int]] = {place: [] for place in episodes.by_place}
        self.is_own: dict[int, list[bool]] = {place: [] for place in episodes.by_place}

    def answered(self, ended: Mapping[int, Completion]) -> Collection[int]:
        """Note answers, and hand them over."""
        for place, completion in ended.items():
            self.tokens[place] += completion.tokens
            self.is_own[place] += [True] * len(completion.tokens)
        return self.episodes.answered(ended)

    def replies(self, wait: bool = False) -> Mapping[int, Request | None]:
        """Note replies; an answer's last token that is not read, such as the end token, is left out."""
        found = self.episodes.replies(wait)
        for place, request in found.items():
            if request is None:
                continue
            num_read = self.episodes.by_place[place].num_replied - self.is_own[place].count(False)
            if num_read == len(request.prompt):
                del self.tokens[place][-1], self.is_own[place][-1]
            self.tokens[place] += request.prompt[len(request.prompt) - num_read :]
            self.is_own[place] += [False] * num_read
        return found


def _with(world: World, params: Params) -> Model:
    return world.model._replace(params=params)
