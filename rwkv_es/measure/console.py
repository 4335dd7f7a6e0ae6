"""What a person sees of a run: one line a step, one a held-out evaluation, and a few answers."""

from typing import Any

from rwkv_es.reward.sheet import Scores
from rwkv_es.session import Answers

NUM_READABLE = 3
_BAR_WIDTH = 16
_SHOWN = 80  # characters of either end of a text


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
    is_alike = num_steps == 0 and (metrics["eval/reward"] == 0 or metrics["eval/accuracy"] == 1)
    hint = " (all score alike: `rwkv-es doctor` looks for a signal and says what may help)" if is_alike else ""
    return (
        f"held out, after {num_steps} steps: accuracy {metrics['eval/accuracy']:.1%}, "
        f"reward {metrics['eval/reward']:.3f} on {metrics['eval/problems']} problems, "
        f"{metrics['eval/tokens_per_answer']:.0f} tokens/answer{hint}"
    )
