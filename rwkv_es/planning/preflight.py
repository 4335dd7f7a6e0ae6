"""Before a run: the task's own answers, read and scored like a model's, and what would not fit."""

import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.engine.stops import cut
from rwkv_es.reward.pool import RewardPool
from rwkv_es.reward.sheet import Scores
from rwkv_es.session import Session, encode_prompt, part_of, reference
from rwkv_es.system.errors import ConfigError, TaskError
from rwkv_es.task.task import SPLITS, EvaluationSet, Problem, Task

NUM_GOLD = 32  # gold answers of a split that are scored before a training run: each may take its whole time limit


class Gold(NamedTuple):
    """What became of the gold answers, read and scored like a model's."""

    num_checked: int  # those that are known
    wrong: str  # the first that does not score 1.0 or cannot be written, in words; "" if there is none
    longest: int  # tokens
    num_too_long: int  # longer than an answer may get
    prompt_tokens: tuple[int, float, int]  # shortest, median, longest


def preflight(config: Config, session: Session, scorers: RewardPool) -> None:
    """Before a training run, read and score the first gold answers; say on stderr what does not fit.

    An objective that samples nothing needs them only as texts to read.

    Raises:
        TaskError: an answer does not score 1.0 by the task's own reward.
        ConfigError: the model's vocabulary cannot express a prompt.
        RewardError: the reward fails on most of them.
    """
    objective, splits = objective_of(config.objective), SPLITS if config.eval_every else SPLITS[:1]
    if objective.logprob:
        for _, problem in _named(session.task, splits, NUM_GOLD):
            reference(session, problem)  # says what cannot be read
    if not objective.samples:
        return
    gold = check_gold(session, scorers, NUM_GOLD, splits)
    if not scorers.is_users:
        refuse_wrong(config, gold)
    for warning in (*gold_warnings(config, gold), *context_warnings(session, gold)):
        print(f"rwkv-es: {warning}", file=sys.stderr)


def refuse_wrong(config: Config, gold: Gold) -> None:
    """Refuse a task whose own reward does not pay its answers; another reward may mean something else.

    Raises:
        TaskError: there is such an answer.
    """
    if gold.wrong and not config.reward:
        raise TaskError(
            f"{gold.wrong}; the answer of a problem must be a text that scores 1.0: mend the answers or the task's "
            'reward (an answer "" means that none is known), or name a reward of yours by --reward'
        )


def _named(task: Task, splits: Sequence[str], size: int) -> Iterator[tuple[str, Problem]]:
    """Yield the first problems of some splits with names for people: instead of "test" of what a model is judged on."""
    for split in splits:
        asked = task.judged_on() if split == "test" else [EvaluationSet("", partial(task.problems, split))]
        for name, problems in asked:
            for index, problem in enumerate(problems()[: size or None]):
                yield f"{name or split} problem {index + 1} ({problem.prompt[:60]!r})", problem


def check_gold(session: Session, scorers: RewardPool, size: int, splits: Sequence[str]) -> Gold:
    """Tokenise and score the known answers of the first `size` (0: all) problems of some splits."""
    named = list(_named(session.task, splits, size))
    lengths = [len(encode_prompt(session, problem)) for _, problem in named]
    prompts = (min(lengths), median(lengths), max(lengths))
    known = [(n, problem) for n, problem in named if problem.answer and part_of(session, problem).setting is None]
    try:
        encoded = [session.tokenizer.encode(problem.answer) for _, problem in known]
    except ConfigError as error:
        return Gold(len(known), f"an answer cannot be written: {error}", 0, 0, prompts)
    problems = [problem for _, problem in known]
    texts = [_as_read(session, problem, ids) for problem, ids in zip(problems, encoded)]
    scores = scorers.score(problems, texts, encoded)
    if scorers.is_users:
        scorers.say_failure(scores)
    bad = list(_wrong([name for name, _ in known], scores, is_failure_said=scorers.is_users))
    too_long = sum(len(ids) > part_of(session, problem).max_new_tokens for problem, ids in zip(problems, encoded))
    return Gold(len(known), bad[0] if bad else "", max(map(len, encoded), default=0), too_long, prompts)


def _wrong(names: Sequence[str], scores: Scores, is_failure_said: bool) -> Iterator[str]:
    for place, (name, reward) in enumerate(zip(names, scores.rewards)):
        if place in scores.causes:
            if not is_failure_said:
                yield f"{name}: the reward failed on its answer: {scores.causes[place]}"
        elif reward != 1.0:
            yield f"{name}: its answer scores {reward}, not 1.0"


def _as_read(session: Session, problem: Problem, ids: Sequence[int]) -> str:
    """Return a gold answer as it would be read from a model's tokens."""
    part = part_of(session, problem)
    return cut(session.tokenizer.decode(ids), part.stop, part.stop_included)


def gold_warnings(config: Config, gold: Gold) -> Iterator[str]:
    """Say what is amiss with the gold answers."""
    if gold.wrong:
        yield gold.wrong + (" (with the reward you gave)" if config.reward else "")
    if gold.num_too_long:
        yield f"{gold.num_too_long} gold answers are longer than an answer may get; raise --max-new-tokens"


def context_warnings(session: Session, gold: Gold) -> Iterator[str]:
    """Warn if prompt and answer may be longer than the texts the model was trained on, as inferred from its name."""
    longest = gold.prompt_tokens[2] + max(part.longest for part in session.parts)
    trained = re.search(r"ctx(\d+)", session.base_path.name)
    if trained and longest > int(trained[1]):
        yield (
            f"a prompt and its answer may have {longest} tokens, but the model was trained on {trained[1]}; "
            "lower --max-new-tokens or --shots"
        )
