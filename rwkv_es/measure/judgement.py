"""What is known of a model after its answers were scored: metrics with intervals, and two models compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_es.environment.episodes import Turn
from rwkv_es.es.fitness import combine
from rwkv_es.measure.metrics import StepCounts, lengths, likelihoods
from rwkv_es.measure.statistics import difference, estimate, mcnemar, passes
from rwkv_es.task import lm_eval_rules
from rwkv_es.task.answers import vote
from rwkv_es.task.task import Problem, Task

GSM8K = "gsm8k"  # the task that is also scored by lm-evaluation-harness's rules


class Judged(NamedTuple):
    """Answers and their rewards, in the order problem, sample."""

    problems: Sequence[Problem]  # each once
    texts: Sequence[str]
    rewards: Sequence[float]
    turns: Sequence[Sequence[Turn]] = ()  # of episodes
    most_turns: int = 0

    def of_problem(self, index: int) -> slice:
        """Return the places of a problem's answers."""
        count = len(self.texts) // len(self.problems)
        return slice(index * count, (index + 1) * count)


class Judgement(NamedTuple):
    """All that is known of one model."""

    path: Path
    task: Task
    greedy: Judged
    sampled: Judged | None
    counted: StepCounts
    name: str = ""  # of the evaluation set
    logprob: Sequence[float] = ()  # mean log-likelihood of each reference answer's tokens, where they were read

    def values(self) -> dict[str, list[float]]:
        """Return every metric's value for each problem."""
        found = {"logprob": list(self.logprob)} if self.logprob else {}
        if self.greedy.texts:
            found |= {**of_greedy(self.greedy), **of_turns(self.greedy), **of_harness(self.task, self.greedy)}
        return found if self.sampled is None else {**found, **of_samples(self.sampled)}


def of_greedy(judged: Judged) -> dict[str, list[float]]:
    """Return whether each problem's one answer is right, and its reward."""
    return {"accuracy": [float(reward >= 1) for reward in judged.rewards], "reward": list(judged.rewards)}


def of_turns(judged: Judged) -> dict[str, list[float]]:
    """Return whether each problem was solved within k turns (k = 1, 2, 4, ...), if they are episodes."""
    found = list(zip(judged.rewards, map(len, judged.turns)))
    ks = [2**i for i in range(judged.most_turns.bit_length()) if 2**i < judged.most_turns]
    return {f"success within {k} turns": [float(r >= 1 and count <= k) for r, count in found] for k in ks if found}


def of_harness(task: Task, judged: Judged) -> dict[str, list[float]]:
    """Return lm-evaluation-harness's two scores of every GSM8K problem; nothing if there are none."""
    found: dict[str, list[float]] = {}
    for problem, text in zip(judged.problems, judged.texts, strict=True):
        if task.part_of(problem).name == GSM8K:
            for name, value in lm_eval_rules.scores(text, problem.answer).items():
                found.setdefault(name, []).append(value)
    return found


def of_samples(judged: Judged) -> dict[str, list[float]]:
    """Return avg@K, maj@K and pass@k (k = 1, 2, 4, ... K) of each problem's K samples."""
    size = len(judged.texts) // len(judged.problems)
    rewards = torch.tensor(judged.rewards, dtype=torch.float64).reshape(1, -1, size)
    agreed = combine(rewards, "maj", [vote(text) for text in judged.texts])
    found = passes(size, (rewards[0] >= 1).sum(-1).tolist())
    means = {f"avg@{size}": rewards[0].mean(-1).tolist(), f"maj@{size}": agreed[0].tolist()}
    return {**means, **{f"pass@{k}": values for k, values in found.items()}}


def describe(judgement: Judgement) -> dict[str, Any]:
    """Return a model's metrics, each with its confidence interval, and what its answers are like."""
    result: dict[str, Any] = {}
    for name, values in judgement.values().items():
        found = estimate(values)
        result.update({name: found.value, f"{name} 95%": [found.low, found.high]})
    counted = judgement.counted
    failures = {
        "reward_errors": counted.errors,
        "reward_timeouts": counted.timeouts,
        "answers_not_finite": counted.broken,
    }
    return {
        **result,
        "problems": len(judgement.greedy.problems),
        **lengths(counted),
        **likelihoods(counted),
        **failures,
    }


def compare(base: Judgement, tuned: Judgement) -> dict[str, Any]:
    """Compare two models on the same problems: the differences, and McNemar's test of right answers."""
    assert [p.prompt for p in base.greedy.problems] == [p.prompt for p in tuned.greedy.problems]
    before, after = base.values(), tuned.values()
    gained: dict[str, Any] = {}
    for name in after:
        found = difference(after[name], before[name])
        gained.update({name: found.value, f"{name} 95%": [found.low, found.high]})
    if "accuracy" not in after:
        return {"difference": gained}
    test = mcnemar([value == 1 for value in after["accuracy"]], [value == 1 for value in before["accuracy"]])
    right = {"right_only_tuned": test.only_first, "right_only_base": test.only_second}
    return {"difference": gained, **right, "mcnemar_p": test.p_value}
