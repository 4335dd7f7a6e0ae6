"""`rwkv-es doctor`: what would go wrong in a training run, found before it starts."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import torch

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.errors import ConfigError
from rwkv_es.es.fitness import combine, has_signal
from rwkv_es.es.strategy import ES
from rwkv_es.measure.health import watch_unperturbed
from rwkv_es.measure.metrics import as_numbers, count
from rwkv_es.planning.preflight import Gold, check_gold, context_warnings, gold_warnings, refuse_wrong
from rwkv_es.reward.pool import RewardPool
from rwkv_es.session import (
    Session,
    answer,
    collect,
    open_scorers,
    open_session,
    warn_if_splits_overlap,
)
from rwkv_es.task.answers import vote
from rwkv_es.task.mixture import draw
from rwkv_es.task.task import SPLITS, Problem

NUM_DIRECTIONS = 4  # mirrored pairs that are tried
SIGMA_FACTORS = (0.25, 1.0, 4.0)
PROBLEMS_WITH_SIGNAL = 4  # that a step should have
TOO_FEW = 0.5  # of the answers that come to an end by themselves


class Spread(NamedTuple):
    """What a noise scale does to the rewards of a few members."""

    sigma: float
    reward: float  # mean
    std: float  # of the members' mean rewards
    share_with_signal: float  # of problems whose rewards differ between members
    share_changed: float  # of answers that differ from the unperturbed model's


class Base(NamedTuple):
    """The unperturbed model's answers to the same problems."""

    rewards: list[float]
    texts: list[str]
    share_stopped: float


class Findings(NamedTuple):
    """Everything that was looked at."""

    gold: Gold
    base: Base
    spreads: list[Spread]


def doctor(config: Config) -> dict[str, Any]:
    """Look at a task, a model and a noise scale as training would use them; print what is found. Returns that.

    Raises:
        RwkvEsError: something cannot be loaded; or, after all is printed, a gold answer does not score 1.0.
    """
    if not objective_of(config.objective).samples:
        raise ConfigError(
            "doctor looks at sampled answers, and objective logprob has none: each of its steps has a signal, so start "
            "rwkv-es train and watch nats/token"
        )
    session = open_session(config)
    warn_if_splits_overlap(session)
    with open_scorers(config) as scorers:
        findings = examine(config, session, scorers)
    result = summary(config, findings)
    result["warnings"] += context_warnings(session, findings.gold)
    print("\n".join(_screen(config, result)))
    print(json.dumps(result))
    refuse_wrong(config, findings.gold)
    return result


def examine(config: Config, session: Session, scorers: RewardPool) -> Findings:
    """Check the gold answers, then let the model and a few members answer the first step's problems."""
    gold = check_gold(session, scorers, config.eval_size, SPLITS)
    problems = session.task.problems("train")
    drawn = [draw(problems, config.seed, position) for position in range(min(config.prompts, len(problems)))]
    base = _ask_base(config, session, scorers, drawn)
    sigmas = [config.sigma * factor for factor in SIGMA_FACTORS]
    spreads = [_spread(config, session, scorers, (drawn, base, sigma)) for sigma in sigmas]
    return Findings(gold, base, spreads)


def _ask_base(config: Config, session: Session, scorers: RewardPool, problems: Sequence[Problem]) -> Base:
    answers = answer(session, problems, samples=config.samples, scorers=scorers)
    scores = collect(answers, scorers)
    scorers.say_failure(scores)
    watch_unperturbed(count(answers, scores), session.base_path.name)
    is_stopped = [completion.finish == "stop" for completion in answers.rollout.completions]
    return Base(as_numbers(scores.rewards), answers.texts, sum(is_stopped) / len(is_stopped))


def _spread(
    config: Config, session: Session, scorers: RewardPool, tried: tuple[Sequence[Problem], Base, float]
) -> Spread:
    """Let the first members of a run's first step answer under a noise scale."""
    problems, base, sigma = tried
    es = ES.of(replace(config, sigma=sigma), session.model, session.base)
    members = es.ask(range(NUM_DIRECTIONS))
    answers = answer(session._replace(model=es.model), problems, members, config.samples, scorers)
    scores = collect(answers, scorers)
    scorers.say_failure(scores)
    if answers.broken:
        share = len(answers.broken) / len(answers.texts)
        print(
            f"rwkv-es: under sigma {sigma:g} the logits of {share:.0%} of the answers are not finite", file=sys.stderr
        )
    by_member = torch.tensor(as_numbers(scores.rewards), dtype=torch.float64)
    how = objective_of(config.objective).samples
    votes = [vote(text) for text in answers.texts] if how == "maj" else []
    rewards = combine(by_member.reshape(-1, len(problems), config.samples), how, votes)  # (N,P)
    changed = [text != base.texts[i % len(base.texts)] for i, text in enumerate(answers.texts)]
    std, share = rewards.mean(1).std(correction=0).item(), has_signal(rewards).double().mean().item()
    return Spread(sigma, rewards.mean().item(), std, share, sum(changed) / len(changed))


def suggest_sigma(base_reward: float, spreads: Sequence[Spread]) -> float:
    """Choose the noise scale under which members differ most in reward, of those that do not break the model.

    Without any signal, the one that changes about half of the answers.
    """
    sound = [spread for spread in spreads if base_reward - spread.reward <= abs(base_reward) / 2] or [spreads[0]]
    return max(sound, key=lambda spread: (spread.std, -abs(spread.share_changed - 0.5))).sigma


def suggest_prompts(share_with_signal: float) -> int | None:
    """Return how many prompts a step needs to have a few with a signal; None if there is none at all."""
    return math.ceil(PROBLEMS_WITH_SIGNAL / share_with_signal) if share_with_signal else None


def summary(config: Config, findings: Findings) -> dict[str, Any]:
    """Return all that was found, and what follows from it."""
    gold, base, spreads = findings
    base_reward = fmean(base.rewards)
    sigma = suggest_sigma(base_reward, spreads)
    best = next(spread for spread in spreads if spread.sigma == sigma)
    return {
        "model": config.model,
        "task": config.task,
        "gold": gold._asdict(),
        "base": {"reward": base_reward, "problems": len(base.rewards), "share_stopped": base.share_stopped},
        "spreads": [spread._asdict() for spread in spreads],
        "zero_signal": 1 - best.share_with_signal,
        "suggested": {"sigma": sigma, "prompts": suggest_prompts(best.share_with_signal)},
        "warnings": list(warnings(config, findings)),
    }


def warnings(config: Config, findings: Findings) -> Iterator[str]:
    """Say what a run would suffer from."""
    gold, base, spreads = findings
    yield from gold_warnings(config, gold)
    if all(reward >= 1 for reward in base.rewards):
        yield "the model gets every problem right already: there is nothing to learn here; take harder problems"
    if all(reward == 0 for reward in base.rewards):
        yield "the model scores 0 on every problem: easier problems, a partial reward or another template may help"
    if not any(spread.share_with_signal for spread in spreads):
        yield "no problem had different rewards under any of these noise scales: a step would move nothing"
    if base.share_stopped < TOO_FEW:
        yield f"only {base.share_stopped:.0%} of the answers come to an end by themselves; raise --max-new-tokens"


def _screen(config: Config, result: dict[str, Any]) -> Iterator[str]:
    gold, base, suggested = result["gold"], result["base"], result["suggested"]
    shortest, middle, longest = gold["prompt_tokens"]
    right = "at least one is wrong" if gold["wrong"] else "all score 1.0"
    yield f"{config.task} with {config.model}"
    yield f"gold answers    {gold['num_checked']} read and scored, {right}; the longest has {gold['longest']} tokens"
    yield f"prompts         {shortest} to {longest} tokens, median {middle:g}"
    yield f"base            reward {base['reward']:.3f} on {base['problems']} answers of the first step"
    for spread in result["spreads"]:
        yield (
            f"sigma {spread['sigma']:<9.3g} reward {spread['reward']:.3f} ± {spread['std']:.3f} over "
            f"{2 * NUM_DIRECTIONS} members, {spread['share_with_signal']:.0%} of problems with signal, "
            f"{spread['share_changed']:.0%} of answers changed"
        )
    prompts = f" --prompts {suggested['prompts']}" if suggested["prompts"] else ""
    yield f"suggestion      --sigma {suggested['sigma']:.3g}{prompts}"
    for warning in result["warnings"]:
        yield f"warning         {warning}"
