"""`rwkv-es train`: evolution strategies with low-rank perturbations (EGGROLL, arXiv 2511.16652)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.options import Config, run_folder, to_dict
from rwkv_es.errors import ConfigError, RewardError
from rwkv_es.es.fitness import combine, shape
from rwkv_es.es.schedule import decay, sigma_at
from rwkv_es.es.strategy import Step, Trainee, move_, rebuild_, trainee
from rwkv_es.es.update import checksum
from rwkv_es.measure.metrics import (
    Clock,
    Tally,
    averaged,
    examples,
    held_out,
    held_out_line,
    packed,
    readable,
    step_line,
    summary,
    tally,
    waits,
)
from rwkv_es.model.forward import draw_factors
from rwkv_es.reward.pool import MIN_ITEMS_FOR_LIMIT, RewardPool, Scores
from rwkv_es.run.cluster import Cluster, joined
from rwkv_es.run.ledger import Ledger
from rwkv_es.run.snapshots import Snapshot
from rwkv_es.run.tracker import open_tracker
from rwkv_es.session import (
    AS_IT_IS,
    Asked,
    Session,
    answer,
    greedy,
    open_scorers,
    open_session,
    warn_if_rows_differ,
    warn_if_splits_overlap,
)
from rwkv_es.task.answers import vote
from rwkv_es.task.mixture import draw
from rwkv_es.task.task import Problem
from rwkv_es.verbs.doctor import preflight


class Run(NamedTuple):
    """What all steps of a run share."""

    config: Config
    cluster: Cluster
    session: Session
    trainee: Trainee
    scorers: RewardPool
    ledger: Ledger | None  # of rank 0: it alone writes
    tracker: Any = None


class Past(NamedTuple):
    """Where a run stands: what rank 0 reads in the folder, and the others are told."""

    num_steps: int
    snapshot_step: int  # 0: no snapshot
    optimizer: dict[str, Any]  # of the snapshot
    steps: list[Step]  # taken since
    held_out: float | None  # score of the weights after the last step, where that is known


_UNTOLD = Past(0, 0, {}, [], None)


def train(config: Config) -> Path | None:
    """Train as the options say, or go on with a run that was interrupted.

    Returns the run folder; None on the processes that do not write it.

    Raises:
        RwkvEsError: something cannot be loaded, written or scored, or another process is lost.
    """
    with joined(config) as cluster:
        session = open_session(config)
        if cluster.is_leader:
            warn_if_rows_differ(session)
            if config.eval_every:
                warn_if_splits_overlap(session)
        trained = trainee(config, session.model, session.base)
        session, folder = session._replace(model=trained.model), run_folder(config)
        ledger = cluster.on_leader(lambda: Ledger.open(folder, to_dict(config), session.base_path))
        try:
            with open_scorers(_scoring(config, cluster)) as scorers:
                cluster.on_leader(
                    lambda: None if ledger is None or ledger.steps else preflight(config, session, scorers)
                )
                _go_on(Run(config, cluster, session, trained, scorers, ledger))
        finally:
            if ledger is not None:
                ledger.close()
    return folder if cluster.is_leader else None


def _go_on(run: Run) -> None:
    """Take the steps that are left."""
    past = restore_(run)
    folder = run.ledger.folder if run.ledger is not None else None
    with open_tracker(run.config, folder, past.num_steps) as tracker:
        run = run._replace(tracker=tracker)
        num_steps = past.num_steps
        is_over = keep_(run, num_steps, past.held_out)
        while not is_over:
            run.cluster.place = f"step {num_steps + 1}"
            take_step_(run, num_steps)
            num_steps += 1
            is_over = keep_(run, num_steps)


def take_step_(run: Run, step: int) -> None:
    """Let every member answer the step's problems; move the weights along the members that did better."""
    config, clock = run.config, Clock()
    problems = draw_problems(config, run.session.task.problems("train"), step)
    sigma, lr = sigma_at(config, step), config.lr * decay(config, step)
    pairs = run.cluster.shard(config.population // 2)  # this process's directions
    factors = draw_factors(run.trainee.noise.at(step, sigma), run.session.model, pairs)
    asked = Asked(range(2 * pairs.start, 2 * pairs.stop), config.samples, step, factors)
    answers = answer(run.session, problems, asked, run.scorers)  # which score while the others are generated
    clock.lap("generate_s")
    scores = run.scorers.collect_()
    clock.lap("score_s")
    mine = as_matrix(scores.rewards, config, answers.texts)  # (members of this process,P)
    rewards, counted, logged = gather_step(run, mine, tally(answers, scores), scores.metrics, clock)  # (N,P)
    refuse_failing(config, counted, scores)
    fitness = shape(rewards, config.fitness)  # (N,)
    clock.lap("wait_s")
    moved = move_(run.trainee, step, fitness, sigma, lr)
    clock.lap("update_s")
    checked = agreed_checksum(run, step)
    if run.ledger is not None:
        still = sum(not any(past.fitness) for past in run.ledger.steps) + (not fitness.any())
        metrics = {**summary(rewards, counted), "steps_without_signal": still, **logged, **clock.laps, **moved}
        note(run, step + 1, metrics)
        run.ledger.write_samples(step + 1, readable(answers, scores))
        tokens = int(counted.read)
        run.ledger.append(Step(step, rewards.tolist(), fitness.tolist(), sigma, lr, tokens, clock.total_s, checked))
        print(step_line(config.steps, step, metrics), flush=True)


def gather_step(
    run: Run, mine: Tensor, counted: Tally, logs: Mapping[str, float], clock: Clock
) -> tuple[Tensor, Tally, dict[str, float]]:
    """Collect the rewards of all members, add up the counters and average what the rewards log.

    The clock gets how long each process waited.
    """
    num_pairs, num_counters = run.config.population // 2, len(counted)
    by_pair = mine.reshape(len(run.cluster.shard(num_pairs)), -1)  # (pairs of this process,2P)
    said = [*counted, clock.total_s, *(packed(logs) if run.config.reward else ())]
    rewards, heard = run.cluster.gather(by_pair, num_pairs, said)
    clock.laps.update(waits(heard[:, num_counters].tolist()))
    logged = averaged(logs, heard[:, num_counters + 1 :]) if run.config.reward else dict(logs)
    return rewards.reshape(run.config.population, -1), Tally(*heard[:, :num_counters].sum(0).tolist()), logged


def agreed_checksum(run: Run, step: int) -> str:
    """Return the checksum of the weights ("" where nobody asks for it); compare it with the others' now and then."""
    is_time = (step + 1) % run.config.checksum_every == 0 or step + 1 == run.config.steps
    found = checksum(run.trainee.updater.weights()) if is_time or run.cluster.is_leader else ""
    if is_time:
        run.cluster.agree("the weights", found)
    return found


def refuse_failing(config: Config, counted: Tally, scores: Scores) -> None:
    """Stop when too many rewards of all processes failed.

    Raises:
        RewardError: with this process's first traceback.
    """
    num_failed = counted.errors + counted.timeouts
    if counted.answers >= MIN_ITEMS_FOR_LIMIT and num_failed > config.reward_error_limit * counted.answers:
        raise RewardError(
            f"the reward failed on {num_failed:g} of {counted.answers:g} answers, {counted.timeouts:g} of them out of "
            f"time; the limit is {config.reward_error_limit:.0%}. Mend the reward, or raise reward_error_limit or "
            f"reward_timeout. The first failure here:\n{scores.first_error}"
        )


def note(run: Run, num_steps: int, metrics: dict[str, float]) -> None:
    """Write scalars down, and show them to the tracker."""
    assert run.ledger is not None
    run.ledger.write_metrics(num_steps, metrics)
    if run.tracker is not None:
        run.tracker.log(metrics, step=num_steps)


def draw_problems(config: Config, problems: Sequence[Problem], step: int) -> list[Problem]:
    """Return the step's problems, a pure function of (seed, step): see `mixture.draw`.

    Raises:
        ConfigError: the task has fewer problems than a step needs.
    """
    if len(problems) < config.prompts:
        raise ConfigError(f"prompts is {config.prompts}, but the task has {len(problems)} training problems")
    first = step * config.prompts
    return [draw(problems, config.seed, position) for position in range(first, first + config.prompts)]


def as_matrix(rewards: Sequence[float | None], config: Config, texts: Sequence[str] = ()) -> Tensor:
    """Combine the samples: rewards in the order member, problem, sample -> (N,P) float64, NaN where all are missing."""
    votes = [vote(text) for text in texts] if config.objective == "maj" else []
    return combine(_floats(rewards).reshape(-1, config.prompts, config.samples), config.objective, votes)


def _floats(rewards: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)


def restore_(run: Run) -> Past:
    """Bring the weights to the ledger's last step: the last snapshot, then the recorded fitness of the steps since.

    Raises:
        CheckpointError: the rebuilt weights are not those that the ledger speaks of.
        ClusterError: the processes' weights differ.
    """
    snapshot = run.cluster.on_leader(lambda: run.ledger.latest_snapshot() if run.ledger is not None else None)
    past = run.cluster.broadcast(_read_past(run.ledger, snapshot) if run.ledger is not None else _UNTOLD)
    if past.snapshot_step:
        params = run.cluster.broadcast_params(snapshot.params if snapshot is not None else None)
        run.trainee.updater.load_(params, past.optimizer)
    for _ in rebuild_(run.trainee, past.steps):
        pass
    run.cluster.agree("the weights", checksum(run.trainee.updater.weights()))
    return past


def _read_past(ledger: Ledger, snapshot: Snapshot | None) -> Past:
    first = snapshot.step if snapshot is not None else 0
    optimizer = snapshot.optimizer if snapshot is not None else {}
    return Past(ledger.next_step, first, optimizer, ledger.steps[first:], ledger.held_out(ledger.next_step))


def hold_out_(run: Run, num_steps: int) -> float:
    """Evaluate on held-out problems, greedily, and write the result down. Returns the mean reward."""
    problems = run.session.task.problems("test")[: run.config.eval_size or None]
    mine = run.cluster.shard(len(problems))
    asked = AS_IT_IS._replace(step=num_steps)
    answers = answer(greedy(run.session), problems[mine.start : mine.stop], asked, run.scorers)
    scores = run.scorers.collect_()
    rewards = _floats(scores.rewards).reshape(-1, 1)
    rewards, counters = run.cluster.gather(rewards, len(problems), tally(answers, scores))
    metrics = held_out(rewards[:, 0].tolist(), Tally(*counters.sum(0).tolist()))
    if run.ledger is not None:
        note(run, num_steps, metrics)
        print("\n".join([held_out_line(num_steps, metrics), *examples(answers, scores)]), flush=True)
    return metrics["held_out_reward"]


def keep_(run: Run, num_steps: int, score: float | None = None) -> bool:
    """Evaluate and snapshot after `num_steps` steps where it is time to and not done yet (`score`: a known result).

    Returns whether the training is over.
    """
    config = run.config
    is_last = num_steps == config.steps
    if score is None and config.eval_every and (num_steps % config.eval_every == 0 or is_last):
        score = hold_out_(run, num_steps)
    is_over = num_steps >= config.steps or has_stalled(run)
    if run.ledger is not None and num_steps:
        best_score = score if score is not None and run.ledger.is_best(score) else None
        is_due = (is_over or num_steps % config.snapshot_every == 0) and not run.ledger.has_snapshot(num_steps)
        if best_score is not None or is_due:
            weights, optimizer = run.trainee.updater.weights(), run.trainee.updater.state()
            run.ledger.save_snapshot(num_steps, weights, optimizer, best_score)
    return is_over


def has_stalled(run: Run) -> bool:
    """Say whether the last `patience` held-out evaluations have brought nothing better."""
    patience = run.config.patience
    if not patience:
        return False
    found = run.ledger is not None and run.ledger.num_evaluations_since_best() >= patience
    if found:
        print(f"stopped early: {patience} held-out evaluations in a row were not better than the best", flush=True)
    return run.cluster.broadcast(found)


def _scoring(config: Config, cluster: Cluster) -> Config:
    """Return the options for the scorers: with several processes, `refuse_failing` judges what fails in all of them."""
    return config if cluster.size == 1 else replace(config, reward_error_limit=1.0)
