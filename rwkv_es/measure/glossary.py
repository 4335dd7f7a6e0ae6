"""Every number of a step's line and of metrics.jsonl: what it is, its unit, its group, and when to worry."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A number of a run; `name` may hold a `*`."""

    name: str
    group: str  # what trackers put before the name: group/name
    unit: str
    meaning: str
    worry: str = ""


METRICS = (
    Metric("step", "", "steps", "steps taken when the line was written; 0: before training"),
    Metric("time", "", "s", "the clock when the line was written, in seconds since 1970"),
    Metric("elapsed_s", "", "s", "how long the run has been worked on, without the pauses between its processes"),
    Metric(
        "reward_mean",
        "train",
        "reward",
        "mean reward of all members' answers in the step, with noise in their weights",
        "far below the held-out reward: sigma is too large. It is noisy where prompts are few: look at eval/reward",
    ),
    Metric(
        "reward_std_of_members",
        "train",
        "reward",
        "spread of the members' mean rewards: what the update learns from",
        "0: nothing is learned. Shrinking with a reward near its best is the end of the road",
    ),
    Metric("reward_of_best_member", "train", "reward", "mean reward of the best member"),
    Metric(
        "share_of_problems_with_signal",
        "train",
        "share",
        "problems of the step on which the members' rewards differ",
        "below 0.1: problems are too easy or too hard, or sigma is too small",
    ),
    Metric(
        "steps_without_signal",
        "train",
        "steps",
        "steps so far that moved nothing, since all rewards were alike",
        "it grows",
    ),
    Metric(
        "reward_errors",
        "train",
        "answers",
        "answers on which the reward failed; they count as 0",
        "above 0: `rwkv-es reward check` shows the failure",
    ),
    Metric("reward_timeouts", "train", "answers", "answers whose reward ran over --reward-timeout", "above 0"),
    Metric(
        "answers_not_finite",
        "train",
        "answers",
        "answers that ended because the logits were not finite; their rewards are missing",
        "above 0: lower sigma or a target's multiplier",
    ),
    Metric("tokens_read", "tokens", "tokens", "tokens that went through the model in the step, those of prompts too"),
    Metric(
        "tokens_per_answer",
        "tokens",
        "tokens",
        "mean length of the sampled answers",
        "it runs to --max-new: answers do not stop any more",
    ),
    Metric(
        "nats_per_token",
        "train",
        "nats",
        "negative log-likelihood of the reference answers' tokens under the members' noise (objective logprob)",
        "it rises over many steps: lr or sigma is too large",
    ),
    Metric("bits_per_byte", "train", "bits", "the same for each byte of the answers, whatever the tokens are"),
    Metric(
        "share_stopped",
        "tokens",
        "share",
        "answers that came to an end by themselves, before --max-new",
        "it falls: raise --max-new, or reward an end",
    ),
    Metric("turns_per_episode", "tokens", "turns", "mean number of answers in an episode"),
    Metric("tokens_per_episode", "tokens", "tokens", "mean length of an episode, answers and replies"),
    Metric("episodes_failed", "train", "episodes", "episodes whose environment failed; they count as 0", "above 0"),
    Metric("episodes_cut", "tokens", "episodes", "episodes that a limit ended", "it is the rule: raise --max-turns"),
    Metric("tokens_per_s", "speed", "tokens/s", "tokens read and sampled in a second of generation"),
    Metric("generate_s", "speed", "s", "seconds until the last answer of this process is there"),
    Metric(
        "score_s",
        "speed",
        "s",
        "seconds that rewards took after the last answer",
        "as long as generate_s: more --reward-workers",
    ),
    Metric("wait_s", "speed", "s", "seconds that rank 0 waited for the other processes' rewards"),
    Metric(
        "wait_s_of_rank_*",
        "waiting",
        "s",
        "seconds that each process waited for the slowest one",
        "one rank waits never: it is slow",
    ),
    Metric("update_s", "speed", "s", "seconds of the weights' update"),
    Metric("sigma", "update", "", "noise scale of the step"),
    Metric("lr", "update", "", "learning rate of the step"),
    Metric(
        "step_rms_per_sigma",
        "update",
        "sigma",
        "how far the step moved an entry of the weights, in units of its noise",
        "above 0.5: lower lr. Below 0.02: raise it",
    ),
    Metric(
        "distance_from_base",
        "update",
        "weight",
        "root mean square of W - W0 over what is trained",
        "held-out reward falls while it grows: lower lr, or --weight-decay",
    ),
    Metric(
        "peak_memory_bytes",
        "memory",
        "bytes",
        "most of the host's memory that rank 0 has held",
        "it grows step by step",
    ),
    Metric("peak_gpu_memory_bytes", "memory", "bytes", "most of the GPU's memory that rank 0 has held"),
    Metric(
        "eval/reward",
        "eval",
        "reward",
        "mean reward of the greedy answers to held-out problems",
        "it falls while reward_mean rises",
    ),
    Metric("eval/accuracy", "eval", "share", "held-out problems whose greedy answer has a reward of 1 or more"),
    Metric("eval/problems", "eval", "problems", "held-out problems that were asked"),
    Metric(
        "eval/avg@*",
        "eval",
        "reward",
        "mean reward of --eval-samples answers to each held-out problem, at the temperature of the training",
    ),
    Metric(
        "eval/pass@*",
        "eval",
        "share",
        "held-out problems that one of k such answers solves, estimated without bias from all of them",
        "it falls while accuracy rises: answers become alike, so raise --temperature, or try --objective pass",
    ),
    Metric(
        "eval/*", "eval", "", "the same numbers of a held-out evaluation; eval/SET/...: of one of several --eval-sets"
    ),
    Metric("reward/*", "reward", "reward", "mean of one of several --reward functions, before its weight"),
    Metric("log/*", "log", "", "mean of what a reward logs: a key of verl's dict, TRL's log_metric and log_extra"),
)


def metric(name: str) -> Metric | None:
    """Return what is known of a metric; of an evaluation set's what is known of it in any evaluation."""
    name = re.sub("^eval/[^/]+/", "eval/", name)
    return next((known for known in METRICS if fnmatchcase(name, known.name)), None)


def grouped(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics under names with a slash, by which trackers group their charts."""
    found = {name: metric(name) for name in metrics}
    return {
        f"{known.group}/{name}" if known and known.group and "/" not in name else name: metrics[name]
        for name, known in found.items()
    }
