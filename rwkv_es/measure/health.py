"""What a step's answers show of the run's health: whether to stop, and what to report."""

import sys

from rwkv_es.config.options import Config
from rwkv_es.errors import ConfigError
from rwkv_es.es.strategy import ES
from rwkv_es.measure.metrics import StepCounts
from rwkv_es.model.weights import Members
from rwkv_es.reward.sheet import MIN_ITEMS_FOR_LIMIT, Scores, too_many_failed
from rwkv_es.session import Answers

MOST_BROKEN = 0.5  # of a step's answers may end because the logits are not finite


def refuse_failing(config: Config, counted: StepCounts, scores: Scores) -> None:
    """Stop when too many rewards of all processes failed.

    Raises:
        RewardError: with this process's first traceback.
    """
    num_failed = counted.errors + counted.timeouts
    if counted.answers >= MIN_ITEMS_FOR_LIMIT and num_failed > config.reward_error_limit * counted.answers:
        raise too_many_failed(num_failed, counted.timeouts, counted.answers, config.reward_error_limit, scores)


def watch_broken(es: ES, counted: StepCounts, members: Members, answers: Answers) -> None:
    """Say on stderr whose logits were not finite; their rewards are missing. `counted` is of all processes.

    Raises:
        ConfigError: most answers of the step ended so.
    """
    if counted.broken > MOST_BROKEN * counted.answers:
        raise ConfigError(
            f"the logits of {counted.broken:g} of {counted.answers:g} answers at step {es.step + 1} were not finite: "
            f"the perturbed weights overflow. Lower sigma (now {es.sigma:g}) or a target's multiplier; if it began in "
            f"the midst of a run, lower lr (now {es.lr:g}) and go on from an earlier step by rwkv-es fork"
        )
    if answers.broken:
        per_member = len(answers.texts) // len(members.ids)
        names = ", ".join(map(str, dict.fromkeys(members.ids[place // per_member] for place in answers.broken)))
        print(
            f"rwkv-es: step {es.step + 1}: {len(answers.broken)} answers ended because the logits were not finite "
            f"(members {names}); their rewards are missing",
            file=sys.stderr,
        )
