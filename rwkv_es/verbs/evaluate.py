"""`rwkv-es eval` and `rwkv-es generate`: answers of a checkpoint, with and without scores."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.engine.references import Reading
from rwkv_es.measure.health import watch_unperturbed
from rwkv_es.measure.judgement import Judged, Judgement, compare, describe
from rwkv_es.measure.metrics import StepCounts, as_numbers, count
from rwkv_es.measure.progress import progress
from rwkv_es.reward.adapters import Scorer
from rwkv_es.reward.pool import RewardPool
from rwkv_es.session import (
    Answers,
    Session,
    answer,
    collect,
    examined_alone,
    greedy,
    open_environments,
    open_scorers,
    open_session,
    read,
)
from rwkv_es.system import tables
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.files import line, refuse_existing, replace, writing
from rwkv_es.system.texts import printable
from rwkv_es.task.splits import problems_to_ask, say_division
from rwkv_es.task.task import EvaluationSet, Problem, Task
from rwkv_es.verbs.drift import drift, with_base

_NUM_SHOWN = 2  # answers of a model to somebody who looks what a reward does with them


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
    num_models = 1 + bool(config.base)
    for place, of_set in enumerate(result["sets"].values() if config.eval_sets else [result]):
        show(config, judgements[num_models * place : num_models * (place + 1)], of_set)
    print(json.dumps(result))
    if config.out:
        rows = (row for judgement in judgements for row in _samples(judgement))
        with writing(Path(config.out)):
            replace(Path(config.out), "".join(map(line, rows)))
    return result


def judged(
    config: Config, task: Task | None = None, scorer: Scorer | None = None
) -> tuple[list[Judgement], dict[str, Any]]:
    """Answer and score a split's problems with one model or two; a task and a scorer may be Python objects.

    Returns what is known of each model on each set, and all metrics with their confidence intervals: the first set's,
    and if there are several of each under `sets`.
    """
    with open_scorers(config, scorer) as scorers:
        by_model = [judge(each, scorers, task) for each in with_base(config)]
    results = [_result(config, *of_set) for of_set in zip(*by_model)]
    judgements = [judgement for of_set in zip(*by_model) for judgement in of_set]
    sets = {of_set["task"]: of_set for of_set in results}
    return judgements, {**results[0], **({"sets": sets} if config.eval_sets else {})}


def _result(config: Config, *judgements: Judgement) -> dict[str, Any]:
    tuned = judgements[-1]
    result = {"model": str(tuned.path), "task": tuned.name or config.task, "split": config.split, **describe(tuned)}
    if config.base:
        result.update(base={"model": str(judgements[0].path), **describe(judgements[0])}, **compare(*judgements))
    return result


def judge(config: Config, scorers: RewardPool, task: Task | None = None) -> list[Judgement]:
    """Let one model answer each set greedily and, with a temperature, `samples` times; score all that.

    With objective logprob it reads the reference answers, too or instead.

    Raises:
        ConfigError: the split is empty, or the samples would all be the same.
    """
    if config.samples > 1 and not config.temperature:
        raise ConfigError(f"samples is {config.samples}, and at temperature 0 they are all the same; try temperature 1")
    session = examined_alone(open_session(config, task))
    with open_environments(config, session, task) as session:
        if session.task.sets:
            return [_judged(config, session, scorers, of_set) for of_set in session.task.sets]
        problems = problems_to_ask(session.task, config.split)
        say_division(problems, "; --split all asks all of them")
        return [_judged(config, session, scorers, EvaluationSet("", lambda: problems))]


def _judged(config: Config, session: Session, scorers: RewardPool, of_set: EvaluationSet) -> Judgement:
    problems, task = of_set.problems()[: config.eval_size or None], of_set.name or config.task
    objective, name = objective_of(config.objective), session.base_path.name
    with progress(f"{task}, greedy", len(problems) * objective.num_kinds) as advance:
        asked = problems if objective.samples else []
        answers = answer(greedy(session), asked, scorers=scorers, advance=advance)
        reading = read(session, problems if objective.logprob else [], advance=advance)
    first, counted = _score(answers, problems, scorers, name, reading)
    sampled, logprob = None, reading.per_token.flatten().tolist()
    if config.temperature and objective.samples:
        with progress(f"{task}, sampled", len(problems) * config.samples) as advance:
            answers = answer(session, problems, samples=config.samples, scorers=scorers, advance=advance)
        sampled, more = _score(answers, problems, scorers, name)
        counted = StepCounts(*(a + b for a, b in zip(counted, more)))
    return Judgement(session.base_path, session.task, first, sampled, counted, of_set.name, logprob)


def _score(
    answers: Answers, problems: Sequence[Problem], scorers: RewardPool, model: str, reading: Reading | None = None
) -> tuple[Judged, StepCounts]:
    scores = collect(answers, scorers)
    scorers.say_failure(scores)
    watch_unperturbed(counted := count(answers, scores, reading), model)
    turns = [answers.turns_of(place) for place in range(len(answers.texts))] if answers.episodes else []
    most = max((episode.setting.limits.turns for episode in answers.episodes.values()), default=0)
    return Judged(problems, answers.texts, as_numbers(scores.rewards), turns, most), counted


def show(config: Config, judgements: Sequence[Judgement], result: dict[str, Any]) -> None:
    """Print what a person reads of a set."""
    columns = [result["base"], result, result["difference"]] if config.base else [result]
    header = ("", "base", "tuned", "difference") if config.base else ("", str(judgements[0].path.stem))
    rows = [
        (name, *(_cell(column[name], *column[f"{name} 95%"]) for column in columns)) for name in judgements[-1].values()
    ]
    title = f"{result['task']}, {config.split}: {result['problems']} problems; 95 % confidence intervals"
    tables.show(header, rows, title)
    if "bits_per_byte" in result:
        print(f"reference answers: {result['nats_per_token']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte")
    if "mcnemar_p" in result:
        print(
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
    answers = answer(session, [problem], samples=config.samples)
    text = "\n\n".join(answers.texts)
    print(printable(text) if sys.stdout.isatty() else text)
    watch_unperturbed(count(answers), session.base_path.name)
    return answers.texts


def _samples(judgement: Judgement) -> Iterator[dict[str, Any]]:
    for decoding, judged in (("greedy", judgement.greedy), ("sampled", judgement.sampled)):
        for index, problem in enumerate(judged.problems if judged is not None else ()):
            assert judged is not None
            place = judged.of_problem(index)
            for sample, (text, reward) in enumerate(zip(judged.texts[place], judged.rewards[place])):
                turns = judged.turns[place.start + sample] if judged.turns else []
                yield {
                    "model": str(judgement.path),
                    **({"set": judgement.name} if judgement.name else {}),
                    "decoding": decoding,
                    "sample": sample,
                    "prompt": problem.prompt,
                    "answer": problem.answer,
                    "completion": text,
                    "reward": reward,
                    **({"turns": [turn._asdict() for turn in turns]} if turns else {}),
                }


def texts_by_problem(config: Config, task: Task, problems: Sequence[Problem]) -> list[list[str]]:
    """Return what the model that the options name answers: a text for each problem, or with a temperature a few."""
    samples = _NUM_SHOWN if config.temperature else 1
    texts = answer(open_session(config, task), problems, samples=samples).texts
    return [texts[samples * place : samples * (place + 1)] for place in range(len(problems))]
