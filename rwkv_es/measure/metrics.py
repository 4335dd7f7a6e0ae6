"""What a person sees of a run: timings, summaries, samples and one line per step."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

from torch import Tensor

from rwkv_es.es.fitness import has_signal
from rwkv_es.reward.pool import Scores
from rwkv_es.session import Answers

NUM_READABLE = 3
_LOGGED = 16  # so many of the numbers that rewards log are averaged over all processes
_BAR_WIDTH = 16
_SHOWN = 80  # characters of either end of a text


class Clock:
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


class Tally(NamedTuple):
    """What is counted of answers: one process's, or all of them added up."""

    answers: float
    read: float  # tokens, of prompts too
    sampled: float  # tokens
    stopped: float  # answers that came to an end by themselves
    errors: float  # of the reward
    timeouts: float


def tally(answers: Answers, scores: Scores) -> Tally:
    """Count a process's answers."""
    completions = answers.rollout.completions
    return Tally(
        len(completions),
        answers.rollout.num_read,
        sum(len(completion.tokens) for completion in completions),
        sum(completion.finish == "stop" for completion in completions),
        scores.errors,
        scores.timeouts,
    )


def summary(rewards: Tensor, counted: Tally) -> dict[str, float]:
    """Summarise a step: rewards (N,P) with NaN for missing ones."""
    by_member = rewards.nanmean(1)
    by_member = by_member[~by_member.isnan()]
    return {
        "reward_mean": rewards.nanmean().item(),
        "reward_std_of_members": by_member.std(correction=0).item(),
        "reward_of_best_member": by_member.max().item() if len(by_member) else 0.0,
        "share_of_problems_with_signal": has_signal(rewards).double().mean().item(),
        **lengths(counted),
        "reward_errors": counted.errors,
        "reward_timeouts": counted.timeouts,
    }


def lengths(counted: Tally) -> dict[str, float]:
    """Say how long the answers are and how many came to an end by themselves."""
    return {
        "tokens_read": counted.read,
        "tokens_per_answer": counted.sampled / counted.answers,
        "share_stopped": counted.stopped / counted.answers,
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


def held_out(rewards: Sequence[float | None], counted: Tally) -> dict[str, float]:
    """Summarise a held-out evaluation; a missing reward counts as 0."""
    values = as_numbers(rewards)
    return {
        "held_out_reward": sum(values) / len(values),
        "held_out_accuracy": sum(reward >= 1 for reward in values) / len(values),
        "held_out_problems": len(values),
        **{f"held_out_{name}": value for name, value in lengths(counted).items()},
    }


def as_numbers(rewards: Sequence[float | None]) -> list[float]:
    """Return rewards for an evaluation, where a missing one counts as 0."""
    return [0.0 if reward is None or math.isnan(reward) else reward for reward in rewards]


def readable(answers: Answers, scores: Scores) -> list[dict[str, Any]]:
    """Pick a few answers for people: the first, middle and last of the step."""
    last = len(answers.texts) - 1
    places = sorted({last * i // (NUM_READABLE - 1) for i in range(NUM_READABLE)})
    return [
        {"prompt": answers.problems[i].prompt, "completion": answers.texts[i], "reward": scores.rewards[i]}
        for i in places
    ]


def examples(answers: Answers, scores: Scores) -> list[str]:
    """Show an answer in a line, if there is one, whatever is in it."""
    shown = zip(answers.problems[:1], answers.texts, scores.rewards)
    return [f"  {_ends(problem.prompt)} -> {_ends(text)}: {reward}" for problem, text, reward in shown]


def _ends(text: str) -> str:
    return repr(text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}")


def step_line(num_steps: int, step: int, metrics: dict[str, float]) -> str:
    """Say in one line how a step went and how long the rest will take."""
    seconds = sum(metrics[name] for name in ("generate_s", "score_s", "update_s"))
    filled = _BAR_WIDTH * (step + 1) // num_steps
    minutes, rest = divmod(round((num_steps - step - 1) * seconds), 60)
    return (
        f"step {step + 1:>{len(str(num_steps))}}/{num_steps} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] "
        f"reward {metrics['reward_mean']:.3f} ± {metrics['reward_std_of_members']:.3f}  "
        f"{metrics['tokens_per_answer']:.0f} tokens/answer  "
        f"{metrics['tokens_read'] / metrics['generate_s']:,.0f} tokens/s  "
        f"moved {metrics['step_rms_per_sigma']:.2f} sigma  ETA {minutes}:{rest:02d}"
    )


def held_out_line(num_steps: int, metrics: dict[str, float]) -> str:
    """Say in one line what a held-out evaluation found; before training, whether there is anything to learn from."""
    is_alike = num_steps == 0 and (metrics["held_out_reward"] == 0 or metrics["held_out_accuracy"] == 1)
    hint = " (all score alike: `rwkv-es doctor` looks for a signal and says what may help)" if is_alike else ""
    return (
        f"held out, after {num_steps} steps: accuracy {metrics['held_out_accuracy']:.1%}, "
        f"reward {metrics['held_out_reward']:.3f} on {metrics['held_out_problems']} problems, "
        f"{metrics['held_out_tokens_per_answer']:.0f} tokens/answer{hint}"
    )
