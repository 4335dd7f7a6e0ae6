"""`rwkv-es doctor`: what would go wrong in a training run, and which options would learn, found before it starts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.es.strategy import ES
from rwkv_es.measure.health import watch_unperturbed
from rwkv_es.measure.metrics import as_numbers, count
from rwkv_es.planning.preflight import Gold, check_gold, context_warnings, gold_warnings, refuse_wrong
from rwkv_es.planning.probing import (
    NUM_DIRECTIONS,
    Base,
    Proposal,
    Spread,
    Trial,
    climb,
    groups_of,
    propose,
    rounded,
    spread_of,
)
from rwkv_es.planning.walk import LARGE_WIDTH, WALK_PROPOSED, walk
from rwkv_es.reward.pool import RewardPool
from rwkv_es.session import (
    Session,
    answer,
    collect,
    examined_alone,
    open_environments,
    open_scorers,
    open_session,
)
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.streams import waiting
from rwkv_es.task.mixture import draw, refuse_too_few
from rwkv_es.task.splits import say_splits
from rwkv_es.task.task import SPLITS, Problem

NUM_PROMPTS = 16  # that are asked at least
TOO_FEW = 0.5  # of the answers that come to an end by themselves


class Findings(NamedTuple):
    """Everything that was looked at."""

    gold: Gold
    base: Base
    spreads: Mapping[str, Sequence[Spread]]  # of each group of targets
    proposal: Proposal
    together: Spread  # under the proposal's noise


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
    session = examined_alone(session, ES.of(config, session.model, session.base).ask(range(1)).factors)
    refuse_too_few(session.task, config.prompts)
    say_splits(session.task)
    with open_scorers(config) as scorers, open_environments(config, session) as session, waiting("asking the model"):
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
    drawn = [
        draw(problems, config.seed, position)
        for position in range(min(max(config.prompts, NUM_PROMPTS), len(problems)))
    ]
    trial = _ask_base(config, session, scorers, drawn)
    spreads = {
        group: climb(partial(spread_of, trial, {group: 1.0}), config.sigma * config.targets.get(group, 1.0))
        for group in groups_of(config.targets, list(session.model.params))
    }
    proposal, together = propose(trial, spreads)
    return Findings(gold, trial.base, spreads, within_walk(config, proposal, session.model.arch.n_embd), together)


def _ask_base(config: Config, session: Session, scorers: RewardPool, problems: Sequence[Problem]) -> Trial:
    """Let the unperturbed model answer."""
    answers = answer(session, problems, samples=config.samples, scorers=scorers)
    scores = collect(answers, scorers)
    scorers.say_failure(scores)
    watch_unperturbed(count(answers, scores), session.base_path.name)
    is_stopped = [completion.finish == "stop" for completion in answers.rollout.completions]
    base = Base(as_numbers(scores.rewards), answers.texts, sum(is_stopped) / len(is_stopped))
    return Trial(config, session, scorers, problems, base)


def within_walk(config: Config, proposal: Proposal, width: int) -> Proposal:
    """Lower the rate if a large model's weights would walk too far, see `planning.walk`."""
    tried = replace(config, **{**proposal._asdict(), "optimizer": "sgd", "fitness": "zscore"})
    found = walk(tried)
    if width < LARGE_WIDTH or found is None or found[1] <= WALK_PROPOSED:
        return proposal
    return proposal._replace(lr=rounded(proposal.lr * WALK_PROPOSED / found[1]))


def summary(config: Config, findings: Findings) -> dict[str, Any]:
    """Return all that was found, and what follows from it."""
    gold, base, spreads, proposal, together = findings
    return {
        "model": config.model,
        "task": config.task,
        "gold": gold._asdict(),
        "base": {"reward": fmean(base.rewards), "problems": len(base.rewards), "share_stopped": base.share_stopped},
        "spreads": {group: [spread._asdict() for spread in own] for group, own in spreads.items()},
        "together": together._asdict(),
        "zero_signal": 1 - together.share_with_signal,
        "suggested": proposal._asdict(),
        "warnings": list(warnings(config, findings)),
    }


def warnings(config: Config, findings: Findings) -> Iterator[str]:
    """Say what a run would suffer from."""
    gold, base = findings.gold, findings.base
    yield from gold_warnings(config, gold)
    if all(reward >= 1 for reward in base.rewards):
        yield "the model gets every problem right already: there is nothing to learn here; take harder problems"
    if all(reward == 0 for reward in base.rewards):
        yield "the model scores 0 on every problem: easier problems, a partial reward or another template may help"
    if not any(spread.share_with_signal for own in findings.spreads.values() for spread in own):
        yield "no problem had different rewards under any of these noise scales: a step would move nothing"
    if base.share_stopped < TOO_FEW:
        yield f"only {base.share_stopped:.0%} of the answers come to an end by themselves; raise --max-new-tokens"


def _screen(config: Config, result: dict[str, Any]) -> Iterator[str]:
    gold, base = result["gold"], result["base"]
    shortest, middle, longest = gold["prompt_tokens"]
    right = "at least one is wrong" if gold["wrong"] else "all score 1.0"
    yield f"{config.task} with {config.model}"
    yield f"gold answers    {gold['num_checked']} read and scored, {right}; the longest has {gold['longest']} tokens"
    yield f"prompts         {shortest} to {longest} tokens, median {middle:g}"
    yield f"base            reward {base['reward']:.3f} on {base['problems']} answers of the first step"
    for group, spreads in result["spreads"].items():
        yield group
        yield from map(_line, spreads)
    if result["zero_signal"] != 1:
        yield "proposed, together"
        yield _line(result["together"])
        yield f"suggestion      {as_flags(Proposal(**result['suggested']))}"
    for warning in result["warnings"]:
        yield f"warning         {warning}"


def _line(spread: Mapping[str, float]) -> str:
    return (
        f"  sigma {spread['sigma']:<9.3g} reward {spread['reward']:.3f} ± {spread['signal']:.3f} over "
        f"{2 * NUM_DIRECTIONS} members, {spread['share_with_signal']:.0%} of problems with signal, "
        f"{spread['share_changed']:.0%} of answers changed"
    )


def as_flags(proposal: Proposal) -> str:
    """Write a proposal as options of `train`."""
    targets = ",".join(f"{group}={factor:g}" for group, factor in proposal.targets.items())
    return (
        f"--sigma {proposal.sigma:g} --lr {proposal.lr:g} --targets {targets} --prompts {proposal.prompts} "
        f"--population {proposal.population}"
    )
