"""The options of how answers are scored, and of how a model is judged on held-out problems."""

from dataclasses import dataclass

from rwkv_es.config.option import MOST_SAMPLES, option

SCORE = "train eval doctor"  # verbs that score answers


@dataclass(frozen=True)
class RewardOptions:
    """Reward."""

    reward: str = option(
        "", "your rewards with weights: file.py:fn=0.7,pkg.mod:fn=0.3 (default: the task's own)", SCORE, paths="many"
    )
    reward_signature: str = option(
        "auto",
        "how a reward of yours is called; auto: inferred from its parameters' names",
        SCORE,
        choices=("auto", "task", "plain", "trl", "trl_messages", "verl"),
    )
    reward_group: str = option(
        "pair",
        "answers that a reward of TRL's form sees together: a mirrored pair's to a problem, a problem's, a step's",
        SCORE,
        choices=("pair", "problem", "step"),
    )
    reward_workers: int = option(
        1,
        "processes that score answers (0: in this process, without time limits)",
        SCORE,
        at_least=0,
        at_most=4096,
        on_resume="free",
    )
    reward_timeout: float = option(
        5.0, "seconds for one answer before its worker is killed", SCORE, above=0, on_resume="free"
    )
    reward_import_timeout: float = option(
        60.0, "seconds for importing a task or reward before its worker is given up", SCORE, above=0, on_resume="free"
    )
    reward_memory: float = option(
        4.0,
        "GiB that a reward's process may allocate beyond what importing it takes (0: any; Linux)",
        SCORE,
        at_least=0,
        on_resume="free",
    )
    reward_cuda: bool = option(
        False,
        "let rewards see the GPUs (CUDA reserves memory in advance: load models at import, or reward_memory 0)",
        SCORE,
        on_resume="free",
    )
    reward_error_limit: float = option(
        0.5, "stop when more than this share of rewards fails", SCORE, above=0, at_most=1, on_resume="free"
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """Evaluation."""

    eval_every: int = option(10, "held-out evaluation every k steps (0: never)", at_least=0, on_resume="free")
    eval_sets: str = option(
        "",
        "what to judge a model on instead of its task's held-out problems: task,task=DATA,...; the first set decides "
        "which weights are the best",
        "train eval",
        on_resume="free",
        paths="many",
    )
    eval_samples: int = option(
        0,
        "answers to each held-out problem at the temperature, besides the greedy one: avg@k and pass@k",
        at_least=0,
        at_most=MOST_SAMPLES,
        on_resume="free",
    )
    eval_size: int = option(
        200, "held-out problems per evaluation and set (0: all)", SCORE, at_least=0, on_resume="free"
    )
    patience: int = option(
        0,
        "stop after this many held-out evaluations in a row without a better one (0: never)",
        at_least=0,
        on_resume="free",
    )
    split: str = option("test", "which split to evaluate", "eval", choices=("train", "test", "all"))
    base: str = option(
        "", "a second checkpoint to compare the model with, on the same problems or text", "eval", paths="one"
    )
    text: str = option(
        "", "read this UTF-8 text instead of a task: perplexity, and KL to the base", "eval", paths="one"
    )
