"""What stands around the steps of a run: restoring it, held-out evaluations, snapshots, and when it is over."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.es.strategy import ES, Step
from rwkv_es.measure.console import examples, held_out_line, held_out_samples
from rwkv_es.measure.health import watch_unperturbed
from rwkv_es.measure.metrics import StepCounts, count, held_out_by, ranks_failing
from rwkv_es.measure.progress import progress
from rwkv_es.model.weights import BASE
from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.sheet import Scores
from rwkv_es.run.cluster import Cluster
from rwkv_es.run.ledger import Ledger
from rwkv_es.run.snapshots import Snapshot
from rwkv_es.session import (
    Session,
    answer,
    collect,
    greedy,
    read,
)


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
    """Where a run stands: what rank 0 reads in the folder, and the others are told."""

    num_steps: int
    snapshot_step: int  # 0: no snapshot
    optimizer: dict[str, Any]  # of the snapshot
    steps: list[Step]  # taken since
    held_out: float | None  # score of the weights after the last step, where that is known


_UNKNOWN = ResumePoint(0, 0, {}, [], None)


def say_failure(run: Run, failing: Sequence[int], scores: Scores) -> None:
    """Let the first of the processes in which rewards failed say how."""
    if failing:
        run.scorers.say_failure(scores if failing[0] == run.cluster.rank else None)


def note(run: Run, num_steps: int, metrics: dict[str, float]) -> None:
    """Write scalars down, and show them to the tracker."""
    assert run.ledger is not None
    run.ledger.write_metrics(num_steps, metrics)
    if run.tracker is not None:
        run.tracker.log(metrics, step=num_steps)


def note_samples(run: Run, num_steps: int, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write answers down, and show them to the tracker."""
    assert run.ledger is not None
    run.ledger.write_samples(num_steps, samples)
    if run.tracker is not None:
        run.tracker.log_samples(samples, num_steps)


def as_tensor(rewards: Sequence[float | None]) -> Tensor:
    """Return rewards as float64 (n,), NaN where they are missing."""
    return torch.tensor([math.nan if reward is None else reward for reward in rewards], dtype=torch.float64)


def restore(run: Run) -> ResumePoint:
    """Bring the weights to the ledger's last step: the last snapshot, then the recorded fitness of the steps since.

    A best snapshot that was damaged is written again on the way.

    Raises:
        CheckpointError: the rebuilt weights are not those that the ledger speaks of.
        ClusterError: the processes' weights differ.
    """
    snapshot = run.cluster.on_leader(lambda: run.ledger.latest_snapshot() if run.ledger is not None else None)
    past = run.cluster.broadcast(_resume_point(run.ledger, snapshot) if run.ledger is not None else _UNKNOWN)
    if past.snapshot_step:
        params = run.cluster.broadcast_params(snapshot.params if snapshot is not None else None)
        run.es.load(past.snapshot_step, params, past.optimizer)
    lost = run.ledger.lost_best() if run.ledger is not None else None
    for _ in run.es.replay(past.steps):
        if run.ledger is not None and run.es.step == lost:
            run.ledger.restore_best(run.es.weights(), run.es.optimizer_state(), lost)
    run.cluster.agree("the weights" if past.num_steps else "the base checkpoint", run.es.checksum())
    return past


def _resume_point(ledger: Ledger, snapshot: Snapshot | None) -> ResumePoint:
    first = snapshot.step if snapshot is not None else 0
    optimizer = snapshot.optimizer if snapshot is not None else {}
    score = None if ledger.changed else ledger.held_out(ledger.next_step)
    return ResumePoint(ledger.next_step, first, optimizer, ledger.steps[first:], score)


def say_where(ledger: Ledger) -> None:
    """Say which folder the run writes to, whether it continues, and what has changed since."""
    print(
        f"continuing {ledger.folder} after step {ledger.next_step}" if ledger.steps else f"writing to {ledger.folder}"
    )
    if ledger.changed:
        print(
            f"rwkv-es: {' and '.join(ledger.changed)} changed since the run's last steps: it goes on with what is "
            "there now, and earlier held-out scores no longer count as the best",
            file=sys.stderr,
        )


def keep(run: Run, score: float | None = None) -> bool:
    """After a step: evaluate and snapshot where it is time to and not done yet. Returns whether the training is over.

    score: the held-out score of these weights, where it is known.
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
    """Answer held-out problems, greedily, and write the result down. Returns the mean of what is paid.

    Raises:
        ConfigError: the model's logits are not finite.
    """
    num_steps, objective = run.es.step, objective_of(run.config.objective)
    problems = run.session.task.problems("test")[: run.config.eval_size or None]
    mine = run.cluster.shard(len(problems))
    members = BASE._replace(step=num_steps)
    own = problems[mine.start : mine.stop]
    with progress("held out", len(own) * objective.num_kinds, run.cluster.is_leader) as advance:
        asked = own if objective.samples else []
        answers = answer(greedy(run.session), asked, members, scorers=run.scorers, advance=advance)
        reading = read(run.session, own if objective.logprob else [], members, advance)
    scores = collect(answers, run.scorers)
    found = torch.full((len(own), 4), torch.nan, dtype=torch.float64)
    found[: len(asked), 0] = as_tensor(scores.rewards)
    if reading.references:
        found[:, 1:] = reading.table
    found, counters = run.cluster.gather(found, len(problems), count(answers, scores, reading))
    say_failure(run, ranks_failing(counters), scores)
    counted = StepCounts(*counters.sum(0).tolist())
    watch_unperturbed(counted, f"the model after {num_steps} steps", run.cluster.is_leader)
    metrics = held_out_by(objective, found, counted)
    if run.ledger is not None:
        note_samples(run, num_steps, held_out_samples(answers, scores))
        note(run, num_steps, {**metrics, "distance_from_base": run.es.distance()})
        print("\n".join([held_out_line(num_steps, metrics), *examples(answers, scores)]), flush=True)
    return metrics["eval/reward"]


def snapshot_if_due(run: Run, score: float | None, is_over: bool) -> None:
    """Save the weights every so many steps, at the end, and where they are the best so far (`score`).

    Pruning waits until then: a run killed before it wrote down its best would lose an earlier snapshot when it opens.
    """
    step = run.es.step
    if run.ledger is None or not step:
        return
    best_score = score if score is not None and run.ledger.is_best(score) else None
    is_due = (is_over or step % run.config.snapshot_every == 0) and not run.ledger.has_snapshot(step)
    if best_score is not None or is_due:
        run.ledger.save_snapshot(step, run.es.weights(), run.es.optimizer_state(), best_score)
    else:
        run.ledger.prune()


def has_stalled(run: Run) -> bool:
    """Say whether the last `patience` held-out evaluations have brought nothing better."""
    patience = run.config.patience
    if not patience:
        return False
    found = run.ledger is not None and run.ledger.num_evaluations_since_best() >= patience
    if found:
        print(f"stopped early: {patience} held-out evaluations in a row were not better than the best", flush=True)
    return run.cluster.broadcast(found)
