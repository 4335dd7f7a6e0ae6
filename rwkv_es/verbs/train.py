"""`rwkv-es train`: evolution strategies with low-rank perturbations (EGGROLL, arXiv 2511.16652)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.file import run_folder
from rwkv_es.config.options import Config, to_dict
from rwkv_es.engine.batch import Verdict
from rwkv_es.errors import ConfigError
from rwkv_es.es.fitness import combine
from rwkv_es.es.strategy import ES, Step, Update
from rwkv_es.measure.console import examples, held_out_line, readable, step_line
from rwkv_es.measure.health import refuse_failing, watch_broken
from rwkv_es.measure.metrics import StepCounts, StepReport, Timer, count, held_out, ranks_failing, step_metrics
from rwkv_es.model.weights import BASE
from rwkv_es.preflight import preflight
from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.sheet import Scores
from rwkv_es.run.cluster import Cluster
from rwkv_es.run.joining import joined, refuse_endless_starts
from rwkv_es.run.launcher import tell_again
from rwkv_es.run.ledger import Ledger
from rwkv_es.run.snapshots import Snapshot
from rwkv_es.run.tracker import open_tracker
from rwkv_es.session import (
    Session,
    answer,
    collect,
    examined,
    greedy,
    open_scorers,
    open_session,
    steady,
    warn_if_splits_overlap,
    warn_if_unsteady,
)
from rwkv_es.task.answers import vote
from rwkv_es.task.mixture import draw
from rwkv_es.task.task import Problem
from rwkv_es.verbs.plan import explaining_out_of_memory


class Run(NamedTuple):
    """What all steps of a run share."""

    config: Config
    cluster: Cluster
    session: Session
    es: ES
    scorers: RewardPool
    ledger: Ledger | None  # of rank 0: it alone writes
    tracker: Any = None


class ResumePoint(NamedTuple):
    """Where a run stands: what rank 0 reads in the folder, and broadcasts to the others."""

    num_steps: int
    snapshot_step: int  # 0: no snapshot
    optimizer: dict[str, Any]  # of the snapshot
    steps: list[Step]  # taken since
    held_out: float | None  # score of the weights after the last step, if that is known


_UNKNOWN = ResumePoint(0, 0, {}, [], None)


def train(config: Config) -> Path | None:
    """Train as the options say, or go on with a run that was interrupted.

    Returns the run folder; None on the processes that do not write it.

    Raises:
        RwkvEsError: something cannot be loaded, written or scored, or another process is lost.
    """
    with joined(config) as cluster, explaining_out_of_memory(config):
        session = steady_everywhere(cluster, open_session(config))
        if cluster.is_leader and config.eval_every:
            warn_if_splits_overlap(session)
        es = ES.of(config, session.model, session.base)
        session, folder = session._replace(model=es.model), run_folder(config)
        ledger = cluster.on_leader(lambda: Ledger.open(folder, to_dict(config), session.base_path))
        try:
            with open_scorers(_scoring(config, cluster)) as scorers:
                cluster.on_leader(
                    lambda: None if ledger is None or ledger.steps else preflight(config, session, scorers)
                )
                _go_on(Run(config, cluster, session, es, scorers, ledger))
        finally:
            if ledger is not None:
                ledger.close()
    return folder if cluster.is_leader else None


def steady_everywhere(cluster: Cluster, session: Session) -> Session:
    """Return the session with products of as many rows as every process's machine needs."""
    mine = examined(session)
    verdict = reduce(Verdict.joined, [cluster.broadcast(mine, rank) for rank in range(cluster.size)])
    if cluster.is_leader:
        warn_if_unsteady(verdict)
    return steady(session, verdict)


def _go_on(run: Run) -> None:
    """Take the steps that are left."""
    past = restore(run)
    run.cluster.on_leader(lambda: refuse_endless_starts(past.num_steps))
    if run.ledger is not None:
        print(
            f"continuing {run.ledger.folder} after step {past.num_steps}"
            if past.num_steps
            else f"writing to {run.ledger.folder}"
        )
    folder = run.ledger.folder if run.ledger is not None else None
    with open_tracker(run.config, folder, past.num_steps) as tracker:
        run = run._replace(tracker=tracker)
        is_over = keep(run, past.held_out)
        while not is_over:
            run.cluster.place = f"step {run.es.step + 1}"
            take_step(run)
            tell_again("step")
            is_over = keep(run)


def take_step(run: Run) -> None:
    """Let every member answer the step's problems; move the weights along the members that did better."""
    config, timer, num_pairs = run.config, Timer(), run.config.population // 2
    problems = draw_problems(config, run.session.task.problems("train"), run.es.step)
    members = run.es.ask(run.cluster.shard(num_pairs))  # of this process
    answers = answer(run.session, problems, members, config.samples, run.scorers)  # which score meanwhile
    timer.lap("generate_s")
    scores = collect(answers, run.scorers)
    timer.lap("score_s")
    mine = StepReport(as_matrix(scores.rewards, config, answers.texts), count(answers, scores), scores.metrics)
    report = mine.gathered(run.cluster, num_pairs, timer.total_s, bool(config.reward))
    say_failure(run, report.failing, scores)
    refuse_failing(config, report.counted, scores)
    watch_broken(run.es, report.counted, members, answers)
    timer.lap("wait_s")
    update = run.es.tell(report.rewards)
    timer.lap("update_s")
    checked = agreed_checksum(run)
    if run.ledger is not None:
        still = sum(not any(past.fitness) for past in run.ledger.steps) + (not update.fitness.any())
        metrics = step_metrics(report, update, timer, still)
        note(run, run.es.step, metrics)
        run.ledger.write_samples(run.es.step, readable(answers, scores))
        run.ledger.append(recorded(report, update, checked, timer.total_s))
        print(step_line(config.steps, update.step, metrics), flush=True)


def recorded(report: StepReport, update: Update, checked: str, seconds: float) -> Step:
    """Return the ledger's record of a step."""
    rewards, fitness, tokens = report.rewards.tolist(), update.fitness.tolist(), int(report.counted.read)
    return Step(update.step, rewards, fitness, update.sigma, update.lr, tokens, seconds, checked)


def agreed_checksum(run: Run) -> str:
    """Return the checksum of the weights ("" if nobody asks for it); compare it with the others' now and then."""
    is_time = run.es.step % run.config.checksum_every == 0 or run.es.step == run.config.steps
    found = run.es.checksum() if is_time or run.cluster.is_leader else ""
    if is_time:
        run.cluster.agree("the weights", found)
    return found


def say_failure(run: Run, failing: Sequence[int], scores: Scores) -> None:
    """Let the first of the processes in which rewards failed say how."""
    if failing:
        run.scorers.say_failure_(scores if failing[0] == run.cluster.rank else None)


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
    """Combine the samples: rewards in the order member, problem, sample -> (N,P) float64, NaN if all are missing."""
    votes = [vote(text) for text in texts] if config.objective == "maj" else []
    return combine(_floats(rewards).reshape(-1, config.prompts, config.samples), config.objective, votes)


def _floats(rewards: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)


def restore(run: Run) -> ResumePoint:
    """Bring the weights to the ledger's last step: the last snapshot, then the recorded fitness of the steps since.

    Raises:
        CheckpointError: the rebuilt weights are not those that the ledger records.
        ClusterError: the processes' weights differ.
    """
    snapshot = run.cluster.on_leader(lambda: run.ledger.latest_snapshot() if run.ledger is not None else None)
    past = run.cluster.broadcast(_resume_point(run.ledger, snapshot) if run.ledger is not None else _UNKNOWN)
    if past.snapshot_step:
        params = run.cluster.broadcast_params(snapshot.params if snapshot is not None else None)
        run.es.load(past.snapshot_step, params, past.optimizer)
    for _ in run.es.replay(past.steps):
        pass
    run.cluster.agree("the weights", run.es.checksum())
    return past


def _resume_point(ledger: Ledger, snapshot: Snapshot | None) -> ResumePoint:
    first = snapshot.step if snapshot is not None else 0
    optimizer = snapshot.optimizer if snapshot is not None else {}
    return ResumePoint(ledger.next_step, first, optimizer, ledger.steps[first:], ledger.held_out(ledger.next_step))


def keep(run: Run, score: float | None = None) -> bool:
    """After a step: evaluate and snapshot if it is time to and not done yet. Returns whether the training is over.

    score: the held-out score of these weights, if it is known.
    """
    score = evaluate_if_due(run) if score is None else score
    is_over = run.es.step >= run.config.steps or has_stalled(run)
    snapshot_if_due(run, score, is_over)
    return is_over


def evaluate_if_due(run: Run) -> float | None:
    """Evaluate on held-out problems every so many steps and after the last one. Returns the mean reward."""
    config, step = run.config, run.es.step
    is_due = config.eval_every and (step % config.eval_every == 0 or step == config.steps)
    return hold_out(run) if is_due else None


def hold_out(run: Run) -> float:
    """Answer held-out problems, greedily, and write the result down. Returns the mean reward."""
    num_steps = run.es.step
    problems = run.session.task.problems("test")[: run.config.eval_size or None]
    mine = run.cluster.shard(len(problems))
    members = BASE._replace(step=num_steps)
    answers = answer(greedy(run.session), problems[mine.start : mine.stop], members, scorers=run.scorers)
    scores = collect(answers, run.scorers)
    rewards = _floats(scores.rewards).reshape(-1, 1)
    rewards, counters = run.cluster.gather(rewards, len(problems), count(answers, scores))
    say_failure(run, ranks_failing(counters), scores)
    metrics = held_out(rewards[:, 0].tolist(), StepCounts(*counters.sum(0).tolist()))
    if run.ledger is not None:
        note(run, num_steps, metrics)
        print("\n".join([held_out_line(num_steps, metrics), *examples(answers, scores)]), flush=True)
    return metrics["held_out_reward"]


def snapshot_if_due(run: Run, score: float | None, is_over: bool) -> None:
    """Save the weights every so many steps, at the end, and if they are the best so far (`score`)."""
    step = run.es.step
    if run.ledger is None or not step:
        return
    best_score = score if score is not None and run.ledger.is_best(score) else None
    is_due = (is_over or step % run.config.snapshot_every == 0) and not run.ledger.has_snapshot(step)
    if best_score is not None or is_due:
        run.ledger.save_snapshot(step, run.es.weights(), run.es.optimizer_state(), best_score)


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
