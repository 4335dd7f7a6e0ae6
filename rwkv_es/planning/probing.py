"""A search for the noise under which a task can be learned: what each group of targets does to rewards and answers.

Of one group at a time, noise scales are tried down to one that changes little and up to one under which members differ
less again: too little noise changes nothing, too much destroys every answer.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.es.fitness import combine, has_signal, shape
from rwkv_es.es.strategy import ES
from rwkv_es.reward.pool import RewardPool
from rwkv_es.session import Session, answer, collect
from rwkv_es.task.answers import vote
from rwkv_es.task.task import Problem

NUM_DIRECTIONS = 8  # mirrored pairs that are tried
SIGMA_FACTOR = 4.0  # between two noise scales
MOST_TRIED = 7  # of a group
OTHER_GROUPS = ("head.weight", "emb.weight")  # tried besides the targets that were given
LITTLE, MUCH = 0.25, 0.95  # of the answers changed
WORTH = 0.5  # of the best group's spread: what a group must have to be proposed
MOST_LOST = 1 / 3  # of the base's reward
STEP = 0.3  # sigma: how far a step should move an entry
FEWEST_PROMPTS, PROBLEMS_WITH_SIGNAL = 8, 4  # of a step
FEWEST_MEMBERS, MOST_MEMBERS, PAIRS_THAT_DIFFER = 64, 1024, 16


class Spread(NamedTuple):
    """What a noise scale does to the rewards of a few members."""

    sigma: float
    reward: float  # mean
    signal: float  # half of what the mean rewards of a pair differ by, root mean square over the pairs
    share_with_signal: float  # of problems whose rewards differ between members
    share_changed: float  # of answers that differ from the unperturbed model's
    share_of_pairs: float = 1.0  # whose members differ in reward
    fitness_std: float = 1.0  # between 1/sqrt(P), rewards of noise, and 1, problems that agree


class Base(NamedTuple):
    """The unperturbed model's answers to the same problems."""

    rewards: list[float]
    texts: list[str]
    share_stopped: float


class Trial(NamedTuple):
    """What is asked, and what the base answers."""

    config: Config
    session: Session
    scorers: RewardPool
    problems: Sequence[Problem]
    base: Base


class Proposal(NamedTuple):
    """Options under which a run should learn."""

    sigma: float
    lr: float
    targets: dict[str, float]
    prompts: int
    population: int


def spread_of(trial: Trial, targets: Mapping[str, float], sigma: float) -> Spread:
    """Let the first members of a run's first step answer under a noise scale."""
    config, session, scorers, problems, base = trial
    es = ES.of(replace(config, sigma=sigma, targets=targets), session.model, session.base)
    answers = answer(session._replace(model=es.model), problems, es.ask(range(NUM_DIRECTIONS)), config.samples, scorers)
    scores = collect(answers, scorers)
    scorers.say_failure(scores)
    if answers.broken:
        share = len(answers.broken) / len(answers.texts)
        print(
            f"rwkv-es: under sigma {sigma:g} the logits of {share:.0%} of the answers are not finite", file=sys.stderr
        )
    values = [0.0 if reward is None or math.isnan(reward) else reward for reward in scores.rewards]
    by_member = torch.tensor(values, dtype=torch.float64)
    how = objective_of(config.objective).samples
    votes = [vote(text) for text in answers.texts] if how == "maj" else []
    rewards = combine(by_member.reshape(-1, len(problems), config.samples), how, votes)  # (N,P)
    changed = [text != base.texts[i % len(base.texts)] for i, text in enumerate(answers.texts)]
    means, fitness = rewards.mean(1), shape(rewards, "zscore")
    return Spread(
        sigma,
        rewards.mean().item(),
        ((means[::2] - means[1::2]) / 2).square().mean().sqrt().item(),
        has_signal(rewards).double().mean().item(),
        sum(changed) / len(changed),
        (means[::2] != means[1::2]).double().mean().item(),
        fitness.std(correction=0).item(),
    )


def groups_of(targets: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Return what is searched, each by itself: the targets, and the head and the embedding if the model has them."""
    return [*targets, *(name for name in OTHER_GROUPS if name not in targets and name in names)]


def climb(spread_at: Callable[[float], Spread], sigma: float) -> list[Spread]:
    """Try noise scales around the given one, see above; return what they do, in order."""
    found = [spread_at(sigma)]
    while found[0].share_changed > LITTLE and len(found) < MOST_TRIED:
        found.insert(0, spread_at(found[0].sigma / SIGMA_FACTOR))
    while not _is_past_the_top(found) and len(found) < MOST_TRIED:
        found.append(spread_at(found[-1].sigma * SIGMA_FACTOR))
    return found


def _is_past_the_top(found: Sequence[Spread]) -> bool:
    last, most = found[-1], max(spread.signal for spread in found)
    return last.share_changed >= MUCH if not most else last.share_changed > 0.5 and last.signal < most / 2


def is_sound(base_reward: float, spread: Spread) -> bool:
    """Say whether the members keep most of the base's reward: what all of them lose is not seen in a pair's signal."""
    return base_reward - spread.reward <= MOST_LOST * abs(base_reward)


def suggest_sigma(base_reward: float, spreads: Sequence[Spread]) -> Spread:
    """Choose the noise scale with the strongest signal, of those that do not break the model.

    Without any signal, the one that changes about half of the answers.
    """
    sound = [spread for spread in spreads if is_sound(base_reward, spread)] or list(spreads[:1])
    return max(sound, key=lambda spread: (spread.signal, -abs(spread.share_changed - 0.5)))


def suggest_targets(base_reward: float, found: Mapping[str, Sequence[Spread]]) -> tuple[float, dict[str, float]]:
    """Choose the groups with the strongest signals, each at its best noise scale: sigma, and multipliers of it."""
    best = {group: suggest_sigma(base_reward, spreads) for group, spreads in found.items()}
    most = max(spread.signal for spread in best.values())
    kept = {group: spread.sigma for group, spread in best.items() if most and spread.signal >= WORTH * most}
    kept = kept or {group: spread.sigma for group, spread in list(best.items())[:1]}
    sigma = next(iter(kept.values()))
    return sigma, {group: own / sigma for group, own in kept.items()}


def suggest_prompts(share_with_signal: float) -> int | None:
    """Return how many prompts a step needs to have a few with a signal; None if there is none at all."""
    return math.ceil(PROBLEMS_WITH_SIGNAL / share_with_signal) if share_with_signal else None


def suggest_population(share_of_pairs: float) -> int:
    """Return how many members a step needs to have some pairs that differ."""
    wanted = 2 * math.ceil(PAIRS_THAT_DIFFER / share_of_pairs) if share_of_pairs else MOST_MEMBERS
    return min(max(wanted, FEWEST_MEMBERS), MOST_MEMBERS)


def suggest_lr(sigma: float, population: int, fitness_std: float) -> float:
    """Return the rate at which a step moves an entry by STEP sigma, that is lr * std of the fitness / sqrt(N)."""
    return STEP * sigma * math.sqrt(population) / (fitness_std or 1.0)


def rounded(value: float) -> float:
    """Keep two digits: what people can read and type."""
    return float(f"{value:.2g}")


def propose(trial: Trial, found: Mapping[str, Sequence[Spread]]) -> tuple[Proposal, Spread]:
    """Choose the options of a run from what was found, and try them together; with what they do."""
    base_reward = sum(trial.base.rewards) / len(trial.base.rewards)
    sigma, targets = suggest_targets(base_reward, found)
    sigma, targets = rounded(sigma), {group: rounded(factor) for group, factor in targets.items()}
    together = spread_of(trial, targets, sigma)
    while not is_sound(base_reward, together) and together.share_changed > LITTLE:
        sigma = rounded(sigma / 2)
        together = spread_of(trial, targets, sigma)
    population = suggest_population(together.share_of_pairs)
    prompts = max(FEWEST_PROMPTS, suggest_prompts(together.share_with_signal) or 0)
    lr = rounded(suggest_lr(sigma, population, together.fitness_std))
    return Proposal(sigma, lr, targets, prompts, population), together
