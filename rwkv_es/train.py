"""`rwkv-es train`: evolution strategies with low-rank perturbations (EGGROLL, arXiv 2511.16652)."""

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_es.config import Config, run_folder, to_dict
from rwkv_es.errors import CheckpointError, ConfigError
from rwkv_es.fitness import shape
from rwkv_es.ledger import Ledger, Step
from rwkv_es.model import draw_factors, with_initial_state
from rwkv_es.noise import Noise, StepNoise, select
from rwkv_es.progress import Clock, held_out, held_out_line, readable, step_line, summary
from rwkv_es.reward import RewardPool
from rwkv_es.session import Asked, Session, answer, greedy, open_scorers, open_session, warn_if_rows_differ
from rwkv_es.task import Problem
from rwkv_es.update import Rule, Updater, checksum


class Run(NamedTuple):
    """What all steps of a run share."""

    config: Config
    session: Session
    noise: Noise
    updater: Updater
    ledger: Ledger
    scorers: RewardPool


def train(config: Config) -> Path:
    """Train as the options say, or go on with a run that was interrupted. Returns the run folder.

    Raises:
        RwkvEsError: something cannot be loaded, written or scored.
    """
    session = open_session(config)
    warn_if_rows_differ(session)
    if any(key == "state" or "time_state" in key for key in config.targets):
        session = session._replace(model=with_initial_state(session.model))
    shapes = {name: tuple(tensor.shape) for name, tensor in session.model.params.items()}
    noise = Noise(config.seed, select(shapes, config.targets, config.rank))
    rule = Rule(config.optimizer, config.momentum, config.weight_decay, config.master, config.seed)
    updater = Updater(session.model, list(noise.targets), rule, session.base)
    folder = run_folder(config)
    with Ledger.open(folder, to_dict(config), session.base_path) as ledger, open_scorers(config) as scorers:
        run = Run(config, session, noise, updater, ledger, scorers)
        restore_(run)
        if ledger.next_step == 0:
            hold_out_(run, 0)
        for step in range(ledger.next_step, config.steps):
            take_step_(run, step)
            keep_(run, step + 1)
    return folder


def take_step_(run: Run, step: int) -> None:
    """Let every member answer the step's problems; move the weights along the members that did better."""
    config, clock = run.config, Clock()
    problems = draw_problems(config, run.session.task.problems("train"), step)
    noise = noise_at(config, run.noise, step)
    factors = draw_factors(noise, run.session.model, range(config.population // 2))
    asked = Asked(range(config.population), config.samples, step, factors)
    answers = answer(run.session, problems, asked)
    clock.lap("generate_s")
    scores = run.scorers.score(answers.problems, answers.texts)
    rewards = as_matrix(scores.rewards, config)  # (N,P)
    fitness = shape(rewards, config.fitness)  # (N,)
    clock.lap("score_s")
    moved = move_(run.updater, config, noise, fitness)
    clock.lap("update_s")
    run.ledger.append(
        Step(
            step,
            rewards.tolist(),
            fitness.tolist(),
            answers.rollout.num_read,
            clock.total_s,
            checksum(run.updater.weights()),
        )
    )
    metrics = {**summary(rewards, answers, scores), **clock.laps, **moved}
    run.ledger.write_metrics(step, metrics)
    run.ledger.write_samples(step, readable(answers, scores))
    print(step_line(config.steps, step, metrics), flush=True)


def move_(updater: Updater, config: Config, noise: StepNoise, fitness: Tensor) -> dict[str, float]:
    """Apply one ES update in place; without any signal there is none. Returns the step's size in units of sigma."""
    if not fitness.any():
        return {"step_rms_per_sigma": 0.0}
    rms_per_sigma = updater.step_(noise, fitness, config.lr * decay(config, noise.step))
    return {"step_rms_per_sigma": sum(rms_per_sigma.values()) / len(rms_per_sigma)}


def noise_at(config: Config, noise: Noise, step: int) -> StepNoise:
    """Return the noise of a step."""
    return noise.at(step, config.sigma * (decay(config, step) if config.sigma_decay else 1.0))


def decay(config: Config, step: int) -> float:
    """Return the schedule's factor: 1 at the first step, `schedule_end` at the last one."""
    if config.schedule == "constant" or config.steps < 2:
        return 1.0
    done = step / (config.steps - 1)
    falling = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.schedule_end + (1 - config.schedule_end) * falling


def draw_problems(config: Config, problems: Sequence[Problem], step: int) -> list[Problem]:
    """Return the step's problems, a pure function of (seed, step): one shuffled pass over all after the other.

    Raises:
        ConfigError: the task has fewer problems than a step needs.
    """
    if len(problems) < config.prompts:
        raise ConfigError(f"prompts is {config.prompts}, but the task has {len(problems)} training problems")
    first = step * config.prompts
    places = [divmod(position, len(problems)) for position in range(first, first + config.prompts)]
    return [problems[_order(config.seed, epoch, len(problems))[place]] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"problem order {seed} {epoch}").shuffle(order)
    return order


def as_matrix(rewards: Sequence[float | None], config: Config) -> Tensor:
    """Average the samples: rewards in the order member, problem, sample -> (N,P) float64, NaN where all are missing."""
    values = torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)
    return values.reshape(config.population, config.prompts, config.samples).nanmean(-1)


def restore_(run: Run) -> None:
    """Bring the weights to the ledger's last step: the last snapshot, then the recorded fitness of the steps since.

    Raises:
        CheckpointError: the rebuilt weights are not those that the ledger speaks of.
    """
    snapshot, first = run.ledger.latest_snapshot(), 0
    if snapshot is not None:
        run.updater.load_(snapshot.params, snapshot.optimizer)
        first = snapshot.step
    for entry in run.ledger.steps[first:]:
        move_(
            run.updater,
            run.config,
            noise_at(run.config, run.noise, entry.step),
            torch.tensor(entry.fitness, dtype=torch.float64),
        )
    if run.ledger.steps and checksum(run.updater.weights()) != run.ledger.steps[-1].checksum:
        raise CheckpointError(
            f"the weights rebuilt for step {run.ledger.next_step} differ from those that were trained; "
            "the base checkpoint or a snapshot was changed, or the device is another: train in a new --run"
        )


def hold_out_(run: Run, num_steps: int) -> float:
    """Evaluate on held-out problems, greedily, and write the result down. Returns the mean reward."""
    problems = run.session.task.problems("test")[: run.config.eval_size or None]
    answers = answer(greedy(run.session), problems)
    scores = run.scorers.score(answers.problems, answers.texts)
    metrics = held_out(answers, scores)
    run.ledger.write_metrics(num_steps, metrics)
    print(held_out_line(num_steps, metrics), flush=True)
    return metrics["held_out_reward"]


def keep_(run: Run, num_steps: int) -> None:
    """Evaluate and snapshot after `num_steps` steps where it is time to."""
    config = run.config
    is_last = num_steps == config.steps
    is_time = config.eval_every and (num_steps % config.eval_every == 0 or is_last)
    score = hold_out_(run, num_steps) if is_time else None
    best_score = score if score is not None and run.ledger.is_best(score) else None
    if best_score is not None or is_last or num_steps % config.snapshot_every == 0:
        run.ledger.save_snapshot(num_steps, run.updater.weights(), run.updater.state(), best_score)
