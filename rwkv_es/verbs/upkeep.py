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
from rwkv_es.measure.metrics import StepCounts, as_numbers, count, held_out_by, ranks_failing
from rwkv_es.measure.progress import progress
from rwkv_es.model.weights import BASE
from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.sheet import Scores
from rwkv_es.run.cluster import Cluster
from rwkv_es.run.ledger import Ledger
from rwkv_es.run.snapshots import Snapshot
from rwkv_es.session import Answers, Session, answer, collect, greedy, read
from rwkv_es.task.task import Problem


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
    """Answer the held-out problems of each set; write down what that finds. Returns the first set's mean reward.

    Raises:
        ConfigError: the model's logits are not finite.
    """
    num_steps = run.es.step
    metrics: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    shown: list[str] = []
    for name, problems in run.session.task.judged_on():
        found, answers, scores = _held_out(run, problems()[: run.config.eval_size or None], name)
        if not metrics and name:  # the first of several also stands for the run
            metrics.update({f"eval/{key.removeprefix(f'eval/{name}/')}": value for key, value in found.items()})
        metrics.update(found)
        samples += held_out_samples(answers, scores, name)
        shown = shown or examples(answers, scores)
    if run.ledger is not None:
        note_samples(run, num_steps, samples)
        note(run, num_steps, {**metrics, "distance_from_base": run.es.distance()})
        print("\n".join([held_out_line(num_steps, metrics), *shown]), flush=True)
    return metrics["eval/reward"]


def _held_out(run: Run, problems: Sequence[Problem], name: str) -> tuple[dict[str, float], Answers, Scores]:
    """Answer problems greedily and, if the options say so, some times at the temperature; read what is to be read."""
    config, objective = run.config, objective_of(run.config.objective)
    mine = run.cluster.shard(len(problems))
    members = BASE._replace(step=run.es.step)
    own = problems[mine.start : mine.stop]
    asked = own if objective.samples else []
    drawn, size = asked if config.eval_samples else [], max(config.eval_samples, 1)
    with progress(
        f"held out {name}".rstrip(), len(own) * objective.num_kinds + len(drawn) * size, run.cluster.is_leader
    ) as advance:
        answers = answer(greedy(run.session), asked, members, scorers=run.scorers, advance=advance)
        reading = read(run.session, own if objective.logprob else [], members, advance)
        scores = collect(answers, run.scorers)
        sampled = answer(run.session, drawn, members, size, run.scorers, first=mine.start, advance=advance)
        others = collect(sampled, run.scorers)
    table = torch.full((len(own), 6), torch.nan, dtype=torch.float64)
    table[: len(asked), 0] = as_tensor(scores.rewards)
    if reading.references:
        table[:, 1:4] = reading.table
    if drawn:
        rewards = torch.tensor(as_numbers(others.rewards), dtype=torch.float64).reshape(-1, size)
        table[:, 4], table[:, 5] = rewards.mean(1), (rewards >= 1).sum(1)
    both = [*count(answers, scores, reading), *count(sampled, others)]
    table, heard = run.cluster.gather(table, len(problems), both)
    first, second = heard.chunk(2, 1)
    say_failure(run, ranks_failing(first + second), scores if scores.causes else others)
    which = f"the model after {run.es.step} steps"
    watch_unperturbed(StepCounts(*(first + second).sum(0).tolist()), which, run.cluster.is_leader)
    counted = StepCounts(*first.sum(0).tolist())
    return held_out_by(objective, table, counted, config.eval_samples, name), answers, scores


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
