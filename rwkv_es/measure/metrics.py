"""Numbers of a run: timings, counts, summaries, and what the processes exchange about a step."""

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from rwkv_es.config.objective import Objective
from rwkv_es.engine.references import Reading
from rwkv_es.environment.counts import EpisodeCounts, counts_of, lengths_of
from rwkv_es.es.fitness import has_signal
from rwkv_es.es.strategy import Update
from rwkv_es.measure.statistics import passes
from rwkv_es.reward.sheet import Scores
from rwkv_es.run.cluster import Cluster
from rwkv_es.session import Answers

_LOGGED = 16  # so many of the numbers that rewards log are averaged over all processes


class Timer:
    """Seconds since the start, and per named lap."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap under `name`."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now

    @property
    def total_s(self) -> float:
        """Return the seconds from the start to the last lap."""
        return self._last - self._start


class StepCounts(NamedTuple):
    """What is counted of answers: one process's, or all of them added up."""

    answers: float
    read: float  # tokens, of prompts too
    sampled: float  # tokens
    stopped: float  # answers that came to an end by themselves
    errors: float  # of the reward
    timeouts: float
    broken: float = 0.0  # answers, sampled or read, whose logits were not finite
    references: float = 0.0  # reference answers that were read, for objective logprob
    reference_tokens: float = 0.0  # of those with finite logits
    reference_bytes: float = 0.0
    log_likelihood: float = 0.0  # in nats
    episodes: float = 0.0  # this and what follows: `EpisodeCounts`; their failures are among errors and timeouts too
    turns: float = 0.0
    episode_tokens: float = 0.0
    episodes_failed: float = 0.0
    episodes_cut: float = 0.0

    @property
    def of_episodes(self) -> EpisodeCounts:
        """What is counted of episodes."""
        return EpisodeCounts(*self[-len(EpisodeCounts._fields) :])


def count(answers: Answers, scores: Scores | None = None, reading: Reading | None = None) -> StepCounts:
    """Count a process's answers, and the reference answers that it has read."""
    completions = answers.rollout.completions
    counted = StepCounts(
        len(completions),
        answers.rollout.num_read,
        sum(len(completion.tokens) for completion in completions),
        sum(completion.finish == "stop" for completion in completions),
        scores.errors if scores is not None else 0,
        scores.timeouts if scores is not None else 0,
        len(answers.broken),
        **counts_of(answers.episodes.values())._asdict(),
    )
    if reading is None:
        return counted
    is_sound = reading.log_likelihood.isfinite().double()  # (M,P)
    tokens, num_bytes = ([getattr(each, name) for each in reading.references] for name in ("num_tokens", "num_bytes"))
    return counted._replace(
        read=counted.read + reading.num_read,
        broken=counted.broken + (1 - is_sound).sum().item(),
        references=is_sound.numel(),
        reference_tokens=(is_sound * torch.tensor(tokens)).sum().item(),
        reference_bytes=(is_sound * torch.tensor(num_bytes)).sum().item(),
        log_likelihood=reading.log_likelihood.nansum().item(),
    )


class StepReport(NamedTuple):
    """What is known of a step: of one process's members, or, once gathered, of all of them."""

    rewards: Tensor  # (members,P) float64, NaN where they are missing
    counted: StepCounts
    logs: Mapping[str, float]  # what the rewards log
    waits: Mapping[str, float] = {}  # how long each process waited for the slowest one
    failing: Sequence[int] = ()  # ranks of the processes in which rewards failed

    def gathered(self, cluster: Cluster, num_pairs: int, busy_s: float, has_logs: bool) -> "StepReport":
        """Collect the reports of all processes, in the order of their members; all must ask alike.

        num_pairs: of all processes. busy_s: how long this process has worked for its part. Counters are added up, logs
        averaged.
        """
        by_pair = self.rewards.reshape(len(self.rewards) // 2, -1)  # (pairs of this process,2P)
        said = [*self.counted, busy_s, *(packed(self.logs) if has_logs else ())]
        rewards, heard = cluster.gather(by_pair, num_pairs, said)
        num_counters = len(self.counted)
        logs = averaged(self.logs, heard[:, num_counters + 1 :]) if has_logs else self.logs
        counted = StepCounts(*heard[:, :num_counters].sum(0).tolist())
        waited, failing = waits(heard[:, num_counters].tolist()), ranks_failing(heard[:, :num_counters])
        return StepReport(rewards.reshape(2 * num_pairs, -1), counted, logs, waited, failing)


def ranks_failing(counters: Tensor) -> list[int]:
    """Return the ranks in which rewards failed, by the counters of each: (size,C)."""
    each = enumerate(counters.tolist())
    return [rank for rank, counted in each if StepCounts(*counted).errors or StepCounts(*counted).timeouts]


def summary(rewards: Tensor, counted: StepCounts) -> dict[str, float]:
    """Summarise a step: rewards (N,P) with NaN for missing ones."""
    by_member = rewards.nanmean(1)
    by_member = by_member[~by_member.isnan()]
    return {
        "reward_mean": rewards.nanmean().item(),
        "reward_std_of_members": by_member.std(correction=0).item(),
        "reward_of_best_member": by_member.max().item() if len(by_member) else 0.0,
        "share_of_problems_with_signal": has_signal(rewards).double().mean().item(),
        **lengths(counted),
        **likelihoods(counted),
        "reward_errors": counted.errors,
        "reward_timeouts": counted.timeouts,
        "answers_not_finite": counted.broken,
    }


def step_metrics(report: StepReport, update: Update, timer: Timer, steps_without_signal: int) -> dict[str, float]:
    """Return a step's scalars, by the names they have in metrics.jsonl."""
    return {
        **summary(report.rewards, report.counted),
        "steps_without_signal": steps_without_signal,
        **report.logs,
        **timer.laps,
        **report.waits,
        "tokens_per_s": report.counted.read / timer.laps["generate_s"],
        "sigma": update.sigma,
        "lr": update.lr,
        "step_rms_per_sigma": update.step_rms_per_sigma,
        **peak_memory(),
    }


def peak_memory() -> dict[str, int]:
    """Say how much memory this process has held at most: the host's, and the GPU's if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def lengths(counted: StepCounts) -> dict[str, float]:
    """Say how long the answers are and how many came to an end by themselves."""
    return {
        "tokens_read": counted.read,
        "tokens_per_answer": counted.sampled / max(counted.answers, 1),
        "share_stopped": counted.stopped / max(counted.answers, 1),
        **lengths_of(counted.of_episodes),
    }


def likelihoods(counted: StepCounts) -> dict[str, float]:
    """Say how likely the reference answers are, all their tokens taken together; nothing where none was read."""
    if not counted.reference_tokens:
        return {}
    return {
        "nats_per_token": -counted.log_likelihood / counted.reference_tokens,
        "bits_per_byte": -counted.log_likelihood / math.log(2) / max(counted.reference_bytes, 1),
    }


def packed(logs: Mapping[str, float]) -> list[float]:
    """Lay out what rewards log for a message of fixed length: a mark of the first names, and their values."""
    names = sorted(logs)[:_LOGGED]
    return [crc32(repr(names).encode()), *(logs[name] for name in names), *[math.nan] * (_LOGGED - len(names))]


def averaged(logs: Mapping[str, float], heard: Tensor) -> dict[str, float]:
    """Average rank 0's numbers over the processes (size,1+_LOGGED) that have logged under the same names."""
    alike = heard[heard[:, 0] == heard[0, 0], 1:]
    return {**logs, **dict(zip(sorted(logs)[:_LOGGED], alike.mean(0).tolist()))}


def waits(busy_s: Sequence[float]) -> dict[str, float]:
    """Say how long each of several processes waited in a step for the slowest one."""
    if len(busy_s) == 1:
        return {}
    return {f"wait_s_of_rank_{rank}": max(busy_s) - seconds for rank, seconds in enumerate(busy_s)}


def held_out(rewards: Sequence[float | None], counted: StepCounts) -> dict[str, float]:
    """Summarise a held-out evaluation; a missing reward counts as 0."""
    values = as_numbers(rewards)
    return {
        "eval/reward": sum(values) / len(values),
        "eval/accuracy": sum(reward >= 1 for reward in values) / len(values),
        "eval/problems": len(values),
        **{f"eval/{name}": value for name, value in lengths(counted).items()},
    }


def held_out_by(
    objective: Objective, found: Tensor, counted: StepCounts, num_samples: int = 0, name: str = ""
) -> dict[str, float]:
    """Summarise an evaluation by an objective: found (P,6), each problem's reward, columns of `Reading.table`, the mean
    reward and the number of right ones of `num_samples` further answers.

    The accuracy is that of the greedy answers; without any there is none. name: of the evaluation set.
    """
    metrics = held_out(found[:, 0].tolist(), counted)
    if objective.logprob:
        log_likelihood, tokens, num_bytes = found[:, 1:4].unbind(1)
        per_token = (log_likelihood / tokens).mean().item()
        metrics["eval/reward"] = objective.outcome * metrics["eval/reward"] + objective.logprob * per_token
        metrics["eval/nats_per_token"] = -(log_likelihood.sum() / tokens.sum()).item()
        metrics["eval/bits_per_byte"] = -(log_likelihood.sum() / num_bytes.sum()).item() / math.log(2)
    if not objective.samples:
        del metrics["eval/accuracy"]
    if num_samples:
        metrics[f"eval/avg@{num_samples}"] = found[:, 4].mean().item()
        each = passes(num_samples, found[:, 5].int().tolist())
        metrics.update({f"eval/pass@{k}": sum(values) / len(values) for k, values in each.items()})
    return {f"eval/{name}/{key.removeprefix('eval/')}": value for key, value in metrics.items()} if name else metrics


def as_numbers(rewards: Sequence[float | None]) -> list[float]:
    """Return rewards for an evaluation, with a missing one as 0."""
    return [0.0 if reward is None or math.isnan(reward) else reward for reward in rewards]
