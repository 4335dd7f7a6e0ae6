"""`rwkv-es eval` and `rwkv-es generate`: answers of a checkpoint, with and without scores."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv_es.config.options import Config
from rwkv_es.errors import ConfigError
from rwkv_es.es.fitness import combine
from rwkv_es.files import append, refuse_existing
from rwkv_es.measure import lm_eval_rules
from rwkv_es.measure.metrics import StepCounts, as_numbers, count, lengths
from rwkv_es.measure.progress import progress
from rwkv_es.measure.statistics import difference, estimate, mcnemar, pass_at_k
from rwkv_es.reward.adapters import Scorer
from rwkv_es.reward.pool import RewardPool
from rwkv_es.session import (
    Answers,
    answer,
    collect,
    examined,
    greedy,
    open_scorers,
    open_session,
    steady,
    warn_if_unsteady,
)
from rwkv_es.task.answers import vote
from rwkv_es.task.task import Problem, Task
from rwkv_es.verbs.drift import drift, with_base

GSM8K = "gsm8k"  # the task that is also scored by lm-evaluation-harness's rules


class Judged(NamedTuple):
    """Answers and their rewards, in the order problem, sample."""

    problems: Sequence[Problem]  # each once
    texts: Sequence[str]
    rewards: Sequence[float]

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

    def values(self) -> dict[str, list[float]]:
        """Return every metric's value for each problem."""
        found = {**of_greedy(self.greedy), **of_harness(self.task, self.greedy)}
        return found if self.sampled is None else {**found, **of_samples(self.sampled)}


def evaluate(config: Config) -> dict[str, Any]:
    """Answer a split's problems and score them, or with `text` read a text; with `base`, compare two models.

    Prints a table and, as the last line, one JSON object, which is returned; with `out`, writes every sample as JSONL.

    Raises:
        RwkvEsError: something cannot be loaded, written or scored.
    """
    if config.text:
        return drift(config)
    if config.out:
        refuse_existing(Path(config.out))
    judgements, result = judged(config)
    if config.out:
        _write_samples(config.out, judgements)
    print("\n".join(table(config, judgements, result)))
    print(json.dumps(result))
    return result


def judged(
    config: Config, task: Task | None = None, scorer: Scorer | None = None
) -> tuple[list[Judgement], dict[str, Any]]:
    """Answer and score a split's problems with one model or two; a task and a scorer may be Python objects.

    Returns what is known of each model, and all metrics with their confidence intervals.
    """
    with open_scorers(config, scorer) as scorers:
        judgements = [judge(each, scorers, task) for each in with_base(config)]
    tuned = judgements[-1]
    result = {"model": str(tuned.path), "task": config.task, "split": config.split, **describe(tuned)}
    if config.base:
        result.update(base={"model": str(judgements[0].path), **describe(judgements[0])}, **compare(*judgements))
    return judgements, result


def judge(config: Config, scorers: RewardPool, task: Task | None = None) -> Judgement:
    """Let one model answer greedily and, with a temperature, `samples` times; score all that.

    Raises:
        ConfigError: the split is empty, or the samples would all be the same.
    """
    if config.samples > 1 and not config.temperature:
        raise ConfigError(f"samples is {config.samples}, and at temperature 0 they are all the same; try temperature 1")
    session = open_session(config, task)
    verdict = examined(session)
    warn_if_unsteady(verdict)
    session = steady(session, verdict)
    problems = session.task.problems(config.split)[: config.eval_size or None]
    with progress(f"{config.task}, greedy", len(problems)) as advance:
        answers = answer(greedy(session), problems, scorers=scorers, advance=advance)
    first, counted = _score(answers, problems, scorers)
    sampled = None
    if config.temperature:
        with progress(f"{config.task}, sampled", len(problems) * config.samples) as advance:
            answers = answer(session, problems, samples=config.samples, scorers=scorers, advance=advance)
        sampled, more = _score(answers, problems, scorers)
        counted = StepCounts(*(a + b for a, b in zip(counted, more)))
    return Judgement(session.base_path, session.task, first, sampled, counted)


def _score(answers: Answers, problems: Sequence[Problem], scorers: RewardPool) -> tuple[Judged, StepCounts]:
    scores = collect(answers, scorers)
    scorers.say_failure_(scores)
    return Judged(problems, answers.texts, as_numbers(scores.rewards)), count(answers, scores)


def of_greedy(judged: Judged) -> dict[str, list[float]]:
    """Return whether each problem's one answer is right, and its reward."""
    return {"accuracy": [float(reward >= 1) for reward in judged.rewards], "reward": list(judged.rewards)}


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
    num_right = (rewards[0] >= 1).sum(-1).tolist()
    ks = sorted({size, *(2**i for i in range(size.bit_length()))})
    passes = {f"pass@{k}": [pass_at_k(size, right, k) for right in num_right] for k in ks}
    return {f"avg@{size}": rewards[0].mean(-1).tolist(), f"maj@{size}": agreed[0].tolist(), **passes}


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
    return {**result, "problems": len(judgement.greedy.problems), **lengths(counted), **failures}


def compare(base: Judgement, tuned: Judgement) -> dict[str, Any]:
    """Compare two models on the same problems: the differences, and McNemar's test of their right answers."""
    assert [p.prompt for p in base.greedy.problems] == [p.prompt for p in tuned.greedy.problems]
    before, after = base.values(), tuned.values()
    gained: dict[str, Any] = {}
    for name in after:
        found = difference(after[name], before[name])
        gained.update({name: found.value, f"{name} 95%": [found.low, found.high]})
    test = mcnemar([value == 1 for value in after["accuracy"]], [value == 1 for value in before["accuracy"]])
    right = {"right_only_tuned": test.only_first, "right_only_base": test.only_second}
    return {"difference": gained, **right, "mcnemar_p": test.p_value}


def table(config: Config, judgements: Sequence[Judgement], result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that a person reads."""
    columns = [result["base"], result, result["difference"]] if config.base else [result]
    titles = ("base", "tuned", "difference") if config.base else (str(judgements[0].path.stem),)
    yield f"{config.task}, {config.split}: {result['problems']} problems; 95 % confidence intervals"
    yield " " * 30 + "".join(f"{title[:26]:<27}" for title in titles)
    for name in judgements[-1].values():
        cells = (_cell(column[name], *column[f"{name} 95%"]) for column in columns)
        yield f"{name:<30}" + "".join(f"{cell:<27}" for cell in cells)
    if config.base:
        yield (
            f"McNemar's exact test: p = {result['mcnemar_p']:.2g} ({result['right_only_tuned']} problems right only "
            f"with the tuned model, {result['right_only_base']} only with the base)"
        )


def _cell(value: float, low: float, high: float) -> str:
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def generate(config: Config) -> list[str]:
    """Answer one question `samples` times and print the answers.

    Raises:
        RwkvEsError: something cannot be loaded.
    """
    session = open_session(config)
    problem = Problem(config.prompt, "")
    texts = answer(session, [problem], samples=config.samples).texts
    print("\n\n".join(texts))
    return texts


def _write_samples(path: str, judgements: Sequence[Judgement]) -> None:
    append(Path(path), [row for judgement in judgements for row in _samples(judgement)])


def _samples(judgement: Judgement) -> Iterator[dict[str, Any]]:
    for decoding, judged in (("greedy", judgement.greedy), ("sampled", judgement.sampled)):
        for index, problem in enumerate(judged.problems if judged is not None else ()):
            assert judged is not None
            place = judged.of_problem(index)
            for sample, (text, reward) in enumerate(zip(judged.texts[place], judged.rewards[place])):
                yield {
                    "model": str(judgement.path),
                    "decoding": decoding,
                    "sample": sample,
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "completion": text,
                    "reward": reward,
                }
