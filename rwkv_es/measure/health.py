"""What a step's answers show of the run's health: whether to stop, and what to report."""

import sys

from torch import Tensor

from rwkv_es.config.options import Config
from rwkv_es.engine.references import Reading
from rwkv_es.es.strategy import ES
from rwkv_es.measure.metrics import StepCounts
from rwkv_es.model.weights import Members
from rwkv_es.reward.sheet import MIN_ITEMS_FOR_LIMIT, Scores, too_many_failed
from rwkv_es.session import Answers
from rwkv_es.system.errors import ConfigError

NUM_WITHOUT_SIGNAL = 3  # steps in a row, after which something is amiss
MOST_BROKEN = 0.5  # of a step's answers may end because the logits are not finite


def refuse_failing(config: Config, counted: StepCounts, scores: Scores) -> None:
    """Stop when too many rewards of all processes failed.

    Raises:
        RewardError: with this process's first traceback.
    """
    num_failed = counted.errors + counted.timeouts
    if counted.answers >= MIN_ITEMS_FOR_LIMIT and num_failed > config.reward_error_limit * counted.answers:
        raise too_many_failed(num_failed, counted.timeouts, counted.answers, config.reward_error_limit, scores)


def watch_broken(
    es: ES, counted: StepCounts, members: Members, answers: Answers, reading: Reading | None = None
) -> None:
    """Say on stderr whose logits were not finite; their rewards are missing. `counted` is of all processes.

    Raises:
        ConfigError: most answers of the step ended so.
    """
    num_answers = counted.answers + counted.references
    if counted.broken > MOST_BROKEN * num_answers:
        raise ConfigError(
            f"the logits of {counted.broken:g} of {num_answers:g} answers at step {es.step + 1} were not finite: "
            f"the perturbed weights overflow. Lower sigma (now {es.sigma:g}) or a target's multiplier; if it began in "
            f"the midst of a run, lower lr (now {es.lr:g}) and go on from an earlier step by rwkv-es fork"
        )
    per_member = len(answers.texts) // len(members.ids)
    broken = [members.ids[place // per_member] for place in answers.broken]
    if reading is not None:
        broken += [members.ids[row] for row in reading.log_likelihood.isnan().nonzero()[:, 0].tolist()]
    if broken:
        names = ", ".join(map(str, dict.fromkeys(broken)))
        print(
            f"rwkv-es: step {es.step + 1}: {len(broken)} answers ended because the logits were not finite "
            f"(members {names}); their rewards are missing",
            file=sys.stderr,
        )


def watch_unperturbed(counted: StepCounts, which: str, can_speak: bool = True) -> None:
    """Say on stderr that answers of weights without noise ended because logits were not finite; they score nothing.

    Raises:
        ConfigError: most answers ended so.
    """
    num_answers = counted.answers + counted.references
    text = f"the logits of {counted.broken:g} of {num_answers:g} answers of {which} were not finite"
    if counted.broken > MOST_BROKEN * num_answers:
        raise ConfigError(
            f"{text}: its weights are damaged or overflow. Try --dtype fp32, or another checkpoint; a run goes on from "
            "an earlier step, with a lower lr, by rwkv-es fork"
        )
    if counted.broken and can_speak:
        print(f"rwkv-es: {text}; they score nothing", file=sys.stderr)


def advise_without_signal(config: Config, num_in_a_row: int, rewards: Tensor) -> None:
    """Say loudly what to try, once in a row of steps whose rewards move nothing: rewards (N,P) of the last."""
    if num_in_a_row != NUM_WITHOUT_SIGNAL:
        return
    known = rewards[~rewards.isnan()]
    if len(known) and bool((known >= 1).all()):
        advice = "every answer is right already, so take harder problems, or a reward that asks for more"
    else:
        larger = f"--sigma {4 * config.sigma:g} (now {config.sigma:g})"
        more = f"--prompts {4 * config.prompts} (now {config.prompts})"
        sampled = "" if config.temperature else ", --temperature 1"
        advice = f"try {larger}, {more}{sampled}, easier problems, or a reward that pays for a part of the way"
    print(
        f"rwkv-es: WARNING: {num_in_a_row} STEPS IN A ROW WITHOUT SIGNAL: the members of each pair earned the same, so "
        f"nothing is learned; {advice}; `rwkv-es doctor` with the same options measures it",
        file=sys.stderr,
        flush=True,
    )
