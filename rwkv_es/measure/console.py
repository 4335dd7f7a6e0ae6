"""What a person sees of a run: one line a step, one a held-out evaluation, and a few answers."""

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rwkv_es.run.ledger import HELD_OUT

if TYPE_CHECKING:
    from rwkv_es.session import Answers, Scores

_NUM_HELD_OUT = 16  # held-out answers of an evaluation that are kept to read
_BAR_WIDTH = 16
_SHOWN = 80  # characters of either end of a text


def readable(answers: "Answers", scores: "Scores") -> list[dict[str, Any]]:
    """Pick a few answers of a step for people: the best, the worst, and one of those between."""
    order = sorted(range(len(answers.texts)), key=lambda place: _rank(scores.rewards[place]), reverse=True)
    kinds = {"best": order[0], "worst": order[-1], "middle": order[len(order) // 2]} if order else {}
    places = {place: kind for kind, place in reversed(kinds.items())}  # of few answers each once, the best first
    return [_sample(answers, scores, place, kind) for place, kind in reversed(places.items())]


def held_out_samples(answers: "Answers", scores: "Scores", name: str = "") -> list[dict[str, Any]]:
    """Pick the first held-out answers for people: of the same problems in every evaluation, of the set of that name."""
    samples = [_sample(answers, scores, place, HELD_OUT) for place in range(min(_NUM_HELD_OUT, len(answers.texts)))]
    return [{**sample, "set": name} for sample in samples] if name else samples


def _sample(answers: "Answers", scores: "Scores", place: int, kind: str) -> dict[str, Any]:
    text, problem = answers.texts[place], answers.problems[place]
    turns = [turn._asdict() for turn in answers.turns_of(place)]
    sample = {"kind": kind, "prompt": problem.prompt, "completion": text, "reward": scores.rewards[place]}
    return {**sample, "turns": turns} if turns else sample


def _rank(reward: float | None) -> float:
    return -math.inf if reward is None else reward


def examples(answers: "Answers", scores: "Scores") -> list[str]:
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
        f"reward {metrics['reward_mean']:.3f} ± {metrics['reward_std_of_members']:.3f}{_likelihood(metrics)}  "
        f"{_length(metrics)}  "
        f"{metrics['tokens_read'] / metrics['generate_s']:,.0f} tokens/s  "
        f"moved {metrics['step_rms_per_sigma']:.2f} sigma  ETA {minutes}:{rest:02d}"
    )


def _length(metrics: dict[str, float], start: str = "") -> str:
    if f"{start}turns_per_episode" in metrics:
        turns, tokens = metrics[f"{start}turns_per_episode"], metrics[f"{start}tokens_per_episode"]
        return f"{turns:.1f} turns and {tokens:.0f} tokens/episode"
    return f"{metrics[f'{start}tokens_per_answer']:.0f} tokens/answer"


def held_out_line(num_steps: int, metrics: dict[str, float]) -> str:
    """Say what a held-out evaluation found, a set in a line; before training, whether there is much to learn from."""
    sets = [name.split("/")[1] for name in metrics if fnmatchcase(name, "eval/*/reward")]
    starts = {f", {name}": f"eval/{name}/" for name in sets} or {"": "eval/"}
    return "\n".join(
        f"held out, after {num_steps} steps{name}: {_held_out(num_steps, metrics, start)}"
        for name, start in starts.items()
    )


def _held_out(num_steps: int, metrics: dict[str, float], start: str) -> str:
    accuracy, is_read = metrics.get(f"{start}accuracy"), f"{start}nats_per_token" in metrics
    is_alike = num_steps == 0 and not is_read and (metrics[f"{start}reward"] == 0 or accuracy == 1)
    hint = " (all score alike: `rwkv-es doctor` looks for a signal and says what may help)" if is_alike else ""
    right = "" if accuracy is None else f"accuracy {accuracy:.1%}, "
    length = "" if accuracy is None else f", {_length(metrics, start)}"
    sampled = [name for name in metrics if name.rpartition("/")[0] + "/" == start and "@" in name]  # avg first
    shown = [f", {name.removeprefix(start)} {metrics[name]:.3f}" for name in (*sampled[:1], *sampled[1:][-1:])]
    return (
        f"{right}reward {metrics[f'{start}reward']:.3f}{''.join(shown)} on {metrics[f'{start}problems']} problems"
        f"{length}{_likelihood(metrics, start)}{hint}"
    )


def _likelihood(metrics: dict[str, float], prefix: str = "") -> str:
    """Say how likely the reference answers are, if they were read."""
    if f"{prefix}nats_per_token" not in metrics:
        return ""
    return f", {metrics[f'{prefix}nats_per_token']:.4f} nats/token, {metrics[f'{prefix}bits_per_byte']:.4f} bits/byte"
