"""`rwkv-es doctor`: what would go wrong in a training run, found before it starts."""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from rwkv_es.config.options import Config
from rwkv_es.errors import ConfigError, TaskError
from rwkv_es.es.fitness import combine, has_signal
from rwkv_es.es.strategy import ES
from rwkv_es.measure.metrics import as_numbers
from rwkv_es.model.tokenizer import cut
from rwkv_es.reward.pool import RewardPool
from rwkv_es.session import (
    Session,
    answer,
    encode_prompt,
    open_scorers,
    open_session,
    part_of,
    warn_if_splits_overlap,
)
from rwkv_es.task.answers import vote
from rwkv_es.task.mixture import draw
from rwkv_es.task.task import SPLITS, Problem

NUM_GOLD = 32  # gold answers of a split that are scored before a training run: each may take its whole time limit
NUM_DIRECTIONS = 4  # mirrored pairs that are tried
SIGMA_FACTORS = (0.25, 1.0, 4.0)
PROBLEMS_WITH_SIGNAL = 4  # that a step should have
TOO_FEW = 0.5  # of the answers that come to an end by themselves


class Gold(NamedTuple):
    """What became of the gold answers, read and scored like a model's."""

    num_checked: int  # those that are known
    wrong: str  # the first that does not score 1.0 or cannot be written, in words; "" where there is none
    longest: int  # tokens
    num_too_long: int  # longer than an answer may get
    prompt_tokens: tuple[int, float, int]  # shortest, median, longest


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


def preflight(config: Config, session: Session, scorers: RewardPool) -> None:
    """Before a training run, read and score the first gold answers; say on stderr what does not fit.

    Raises:
        TaskError: an answer does not score 1.0 by the task's own reward.
        ConfigError: the model's vocabulary cannot express a prompt.
        RewardError: the reward fails on most of them.
    """
    gold = check_gold(session, scorers, NUM_GOLD, SPLITS if config.eval_every else SPLITS[:1])
    refuse_wrong(config, gold)
    for warning in (*gold_warnings(config, gold), *context_warnings(session, gold)):
        print(f"rwkv-es: {warning}", file=sys.stderr)


def refuse_wrong(config: Config, gold: Gold) -> None:
    """Refuse a task whose own reward does not pay its answers; another reward may mean something else.

    Raises:
        TaskError: there is such an answer.
    """
    if gold.wrong and not config.reward:
        raise TaskError(
            f"{gold.wrong}; the answer of a problem must be a text that scores 1.0: mend the answers or the task's "
            'reward (an answer "" says that none is known), or name a reward of yours by --reward'
        )


def examine(config: Config, session: Session, scorers: RewardPool) -> Findings:
    """Check the gold answers, then let the model and a few members answer the first step's problems."""
    gold = check_gold(session, scorers, config.eval_size, SPLITS)
    problems = session.task.problems("train")
    drawn = [draw(problems, config.seed, position) for position in range(min(config.prompts, len(problems)))]
    base = _ask_base(config, session, scorers, drawn)
    sigmas = [config.sigma * factor for factor in SIGMA_FACTORS]
    spreads = [_spread(config, session, scorers, (drawn, base, sigma)) for sigma in sigmas]
    return Findings(gold, base, spreads)


def check_gold(session: Session, scorers: RewardPool, size: int, splits: Sequence[str]) -> Gold:
    """Tokenise and score the known answers of the first `size` (0: all) problems of some splits."""
    named = [
        (f"{split} problem {index + 1} ({problem.prompt[:60]!r})", problem)
        for split in splits
        for index, problem in enumerate(session.task.problems(split)[: size or None])
    ]
    lengths = [len(encode_prompt(session, problem)) for _, problem in named]
    prompts = (min(lengths), median(lengths), max(lengths))
    known = [(name, problem) for name, problem in named if problem.answer]
    try:
        encoded = [session.tokenizer.encode(problem.answer) for _, problem in known]
    except ConfigError as error:
        return Gold(len(known), f"an answer cannot be written: {error}", 0, 0, prompts)
    problems = [problem for _, problem in known]
    texts = [_as_read(session, problem, ids) for problem, ids in zip(problems, encoded)]
    rewards = scorers.score(problems, texts, encoded).rewards
    bad = [f"{name}: its answer scores {reward}, not 1.0" for (name, _), reward in zip(known, rewards) if reward != 1.0]
    too_long = sum(len(ids) > part_of(session, problem).max_new for problem, ids in zip(problems, encoded))
    return Gold(len(known), bad[0] if bad else "", max(map(len, encoded), default=0), too_long, prompts)


def _as_read(session: Session, problem: Problem, ids: Sequence[int]) -> str:
    """Return a gold answer as it would be read from a model's tokens."""
    part = part_of(session, problem)
    return cut(session.tokenizer.decode(ids), part.strings, part.ends)


def _ask_base(config: Config, session: Session, scorers: RewardPool, problems: Sequence[Problem]) -> Base:
    answers = answer(session, problems, samples=config.samples)
    scores = scorers.score(answers.problems, answers.texts, answers.token_ids)
    is_stopped = [completion.finish == "stop" for completion in answers.rollout.completions]
    return Base(as_numbers(scores.rewards), answers.texts, sum(is_stopped) / len(is_stopped))


def _spread(
    config: Config, session: Session, scorers: RewardPool, tried: tuple[Sequence[Problem], Base, float]
) -> Spread:
    """Let the first members of a run's first step answer under a noise scale."""
    problems, base, sigma = tried
    es = ES.of(replace(config, sigma=sigma), session.model, session.base)
    answers = answer(session._replace(model=es.model), problems, es.ask(range(NUM_DIRECTIONS)), config.samples)
    scores = scorers.score(answers.problems, answers.texts, answers.token_ids)
    by_member = torch.tensor(as_numbers(scores.rewards), dtype=torch.float64)
    votes = [vote(text) for text in answers.texts] if config.objective == "maj" else []
    rewards = combine(by_member.reshape(-1, len(problems), config.samples), config.objective, votes)  # (N,P)
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
    """Return how many prompts a step needs to have a few with a signal; None where there is none at all."""
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
        yield f"only {base.share_stopped:.0%} of the answers come to an end by themselves; raise --max-new"


def gold_warnings(config: Config, gold: Gold) -> Iterator[str]:
    """Say what is amiss with the gold answers."""
    if gold.wrong:
        yield gold.wrong + (" (with the reward you gave)" if config.reward else "")
    if gold.num_too_long:
        yield f"{gold.num_too_long} gold answers are longer than an answer may get; raise --max-new"


def context_warnings(session: Session, gold: Gold) -> Iterator[str]:
    """Say where prompt and answer may be longer than the texts the model was trained on, which its name may tell."""
    longest = gold.prompt_tokens[2] + max(part.max_new for part in session.parts)
    trained = re.search(r"ctx(\d+)", session.base_path.name)
    if trained and longest > int(trained[1]):
        yield (
            f"a prompt and its answer may have {longest} tokens, but the model was trained on {trained[1]}; "
            "lower --max-new or --shots"
        )


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
