"""`rwkv-es eval` and `rwkv-es generate`: answers of a checkpoint, with and without scores."""

import json
from pathlib import Path
from typing import Any

from rwkv_es.config import Config
from rwkv_es.errors import ConfigError
from rwkv_es.progress import held_out
from rwkv_es.session import AS_IT_IS, answer, open_scorers, open_session, warn_if_rows_differ
from rwkv_es.task import Problem


def evaluate(config: Config) -> dict[str, float]:
    """Answer a split's problems and score them; print the averages and, with `out`, write every sample as JSONL.

    Raises:
        RwkvEsError: something cannot be loaded, written or scored.
    """
    session = open_session(config)
    warn_if_rows_differ(session)
    problems = session.task.problems(config.split)[: config.eval_size or None]
    if not problems:
        raise ConfigError(f"the {config.split} split of task {config.task} is empty")
    with open_scorers(config) as scorers:
        answers = answer(session, problems, AS_IT_IS._replace(samples=config.samples))
        scores = scorers.score(answers.problems, answers.texts)
    if config.out:
        _write_samples(config.out, answers.problems, answers.texts, scores.rewards)
    result = {name.removeprefix("held_out_"): value for name, value in held_out(answers, scores).items()}
    result.update(reward_errors=scores.errors, reward_timeouts=scores.timeouts)
    print(json.dumps({"model": str(session.base_path), "task": config.task, "split": config.split, **result}))
    return result


def generate(config: Config) -> list[str]:
    """Answer one question `samples` times and print the answers.

    Raises:
        RwkvEsError: something cannot be loaded.
    """
    session = open_session(config)
    problem = Problem(config.prompt, "")
    texts = answer(session, [problem], AS_IT_IS._replace(samples=config.samples)).texts
    print("\n\n".join(texts))
    return texts


def _write_samples(path: str, problems: list[Problem], texts: list[str], rewards: list[Any]) -> None:
    rows = (
        {"prompt": problem.prompt, "answer": problem.answer, "completion": text, "reward": reward}
        for problem, text, reward in zip(problems, texts, rewards)
    )
    try:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the samples to {path}: {error.strerror}") from None
