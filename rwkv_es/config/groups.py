"""Every option, once, in groups: a function takes a group, and the options name the commands that have them."""

from collections.abc import Mapping
from dataclasses import dataclass

from rwkv_es.config.option import MOST_ANSWERS, MOST_NEW, MOST_SAMPLES, MOST_SLOTS, TRACKERS, option
from rwkv_es.config.scoring import SCORE, EvaluationOptions, RewardOptions

DEFAULT_TARGETS = {"matrices": 1.0}
DEFAULT_PENALTY_DECAY = 0.996  # of the rwkv package

_ASK = "train eval generate doctor"  # verbs that ask a task's questions
_ALL = f"{_ASK} chat"


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    model: str = option(
        "tiny",
        "checkpoint (.pth or .safetensors), Hugging Face directory, hf:OWNER/NAME/FILE.pth or hf:OWNER/NAME of the "
        "hub, a run's folder, or an embedded one: tiny, tiny-guess",
        _ALL,
        paths="one",
    )
    tokenizer: str = option(
        "auto", '"auto" (a tokenizer.json beside the model, else World), "world", or a JSON file', _ALL, paths="one"
    )
    state: str = option(
        "",
        "file with an initial state (blocks.*.att.time_state) to start every text from",
        "eval generate chat",
        paths="one",
    )
    dtype: str = option(
        "auto",
        "dtype of the weights in the engine; auto: the file's (bf16 becomes fp32 on a CPU)",
        _ALL,
        choices=("auto", "fp32", "bf16"),
        on_resume="same",
    )
    quantize: str = option(
        "none",
        "int8: large matrices in 8 bits, steps go onto their grid at random; fp8: the blocks' products in 8 bits",
        _ASK,
        choices=("none", "int8", "fp8"),
        on_resume="same",
    )
    state_dtype: str = option(
        "fp32",
        "how states are stored; fp16: half the memory, logits move by 5e-4 of their size",
        _ASK,
        choices=("fp32", "fp16"),
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...", _ALL)


@dataclass(frozen=True)
class TaskOptions:
    """Task and prompt."""

    task: str = option(
        "countdown_mini",
        "built-in task, path to your own folder or .py file, or a mixture: a=1,b=2",
        _ASK,
        paths="many",
    )
    data: str = option(
        "",
        "the task's data: local file or folder (default: its own source); of a mixture a=PATH,...",
        SCORE,
        paths="many",
    )
    template: str = option("auto", "prompt template (chat, think, short_think, ..., raw); auto: the task's own", _ALL)
    system: str = option("", "system text before the first turn (templates system, chat, think, short_think)", _ALL)
    shots: str = option("0", "solved problems shown before each question, or a text file instead", _ASK, paths="one")
    bos: bool = option(False, "start every prompt with token 0", _ALL)
    prompt: str = option("", "the question to answer", "generate")


@dataclass(frozen=True)
class ESOptions:
    """Evolution strategy."""

    population: int = option(
        256, "members per step (even: they come in mirrored pairs)", "train doctor", at_least=1, at_most=MOST_ANSWERS
    )
    prompts: int = option(
        8, "problems that every member answers in a step", "train doctor", at_least=1, at_most=MOST_ANSWERS
    )
    samples: int = option(
        1, "completions per member and problem (eval: besides the greedy one)", _ASK, at_least=1, at_most=MOST_SAMPLES
    )
    steps: int = option(100, "training steps", "train doctor", at_least=0, on_resume="free")
    sigma: float = option(1e-3, "noise scale", "train doctor", above=0)
    lr: float = option(1e-3, "learning rate alpha of W += alpha/N * sum f*eps", "train doctor", above=0)
    targets: Mapping[str, float] = option(
        DEFAULT_TARGETS,
        "what is perturbed: name=multiplier,...; a name is matrices, vectors, state, or a pattern like head.weight",
        "train doctor",
        on_resume="same",
    )
    rank: int = option(1, "rank of a perturbation", "train doctor", above=0, on_resume="same")
    objective: str = option(
        "mean",
        "what is paid: mean, pass (the best) or maj (the majority's) of the samples' rewards; logprob: mean "
        "log-likelihood of the reference answer, without sampling; or a sum: outcome=1,logprob=0.1",
        "train doctor eval",
    )
    fitness: str = option(
        "zscore", "shaping of rewards into fitness", choices=("zscore", "centered", "rank", "sign", "raw")
    )
    schedule: str = option(
        "constant", "decay of the learning rate over the steps", choices=("constant", "linear", "cosine")
    )
    schedule_end: float = option(
        0.1, "fraction of lr (and of sigma with sigma_decay) reached at the last step", above=0, at_most=1
    )
    sigma_decay: bool = option(False, "let sigma follow the schedule too")
    optimizer: str = option(
        "sgd", "optimiser on the ES gradient", choices=("sgd", "momentum", "adam"), on_resume="same"
    )
    momentum: float = option(0.9, "momentum, and Adam's beta1", at_least=0, on_resume="same")
    weight_decay: float = option(0.0, "anchored decay: W -= lr * weight_decay * (W - W0)", at_least=0, on_resume="same")
    master: str = option(
        "fp32",
        "bf16 weights: keep an fp32 master copy, or round stochastically",
        choices=("fp32", "stochastic"),
        on_resume="same",
    )
    seed: int = option(0, "seed of noise, sampling and problem order", _ALL, at_least=0, on_resume="same")


@dataclass(frozen=True)
class DecodingOptions:
    """Answers."""

    max_new_tokens: int = option(
        0,
        "longest completion in tokens (0: the task's own)",
        _ALL,
        at_least=0,
        at_most=MOST_NEW,
        formerly="max_new",
    )
    max_turns: int = option(0, "most answers in an episode (0: the task's own)", SCORE, at_least=0, at_most=MOST_NEW)
    max_episode_tokens: int = option(0, "most tokens in it (0: the task's own)", SCORE, at_least=0, at_most=MOST_NEW)
    max_episode_seconds: float = option(0.0, "most seconds of its environment (0: the task's own)", SCORE, at_least=0)
    temperature: float = option(0.0, "sampling temperature; 0 is greedy", _ALL, at_least=0)
    top_p: float = option(
        1.0, "nucleus sampling: smallest set of tokens with this probability", _ALL, above=0, at_most=1
    )
    top_k: int = option(0, "sample among the k likeliest tokens (0: all)", _ALL, at_least=0)
    min_p: float = option(
        0.0,
        "sample among tokens at least this likely, in units of the likeliest one's probability (0: all)",
        _ALL,
        at_least=0,
        at_most=1,
    )
    presence_penalty: float = option(
        0.0, "taken off the logit of each token that the answer has already (greedy too)", _ALL
    )
    frequency_penalty: float = option(
        0.0, "taken off besides, each time that it was written; blanks and digits are not counted", _ALL
    )
    penalty_decay: float = option(
        DEFAULT_PENALTY_DECAY, "what every further token leaves of these counts", _ALL, above=0, at_most=1
    )


@dataclass(frozen=True)
class EngineOptions:
    """Speed and memory."""

    slots: int = option(
        0,
        "generations in flight (0: 256 on a CPU, as many as fit on a GPU)",
        SCORE,
        at_least=0,
        at_most=MOST_SLOTS,
        on_resume="free",
    )
    engine: str = option(
        "auto",
        "numba: fused CPU kernels; triton: GPU ones; torch: anywhere; auto: the fastest that agrees with torch",
        _ASK,
        choices=("auto", "torch", "numba", "triton"),
    )
    threads: int = option(0, "CPU threads (0: all cores)", _ALL, at_least=0, at_most=4096, on_resume="free")


@dataclass(frozen=True)
class RunOptions:
    """Run folder."""

    run: str = option(
        "",
        "run folder (default: runs/<task>-<model>, and a hash of the options that are not the defaults)",
        "train export replay fork",
        on_resume="free",
        paths="one",
    )
    resume: str = option(
        "auto",
        "auto: continue a run found in the folder; never: refuse a folder that has one",
        choices=("auto", "never"),
        on_resume="free",
    )
    snapshot_every: int = option(10, "snapshot of the weights every k steps", above=0, on_resume="free")
    keep: int = option(2, "snapshots kept besides the best one", above=0, on_resume="free")
    tracker: str = option(
        "auto",
        "where scalars go besides metrics.jsonl; auto: TensorBoard if it is installed",
        choices=("auto", "none", *TRACKERS),
        on_resume="free",
    )
    checksum_every: int = option(10, "compare the weights of all processes every k steps", above=0, on_resume="free")
    rank_timeout: float = option(
        600.0, "seconds that processes wait for one that is silent before all end", above=0, on_resume="free"
    )
    weights: str = option("best", "which weights of the run", "export", choices=("best", "last"))
    format: str = option(
        "auto",
        "form of the export: auto: as --out ends, else .pth; hf: a Hugging Face directory, which --out names",
        "export",
        choices=("auto", "pth", "safetensors", "hf"),
    )
    push: str = option("", "repository of the hub that it goes to as well, with a model card: OWNER/NAME", "export")
    step: int = option(-1, "number of steps taken (replay: -1 verifies every step)", "replay fork")
    out: str = option("", "output file; fork: the new run's folder", "eval export fork", paths="one")


@dataclass(frozen=True)
class PlanOptions:
    """Plan."""

    gpus: str = option("", "devices to plan for, such as 8xh100-80 or 2x24gb (default: this machine)", "plan")
    prompt_tokens: int = option(128, "mean length of a prompt in tokens", "plan", at_least=1)
    measure: bool = option(False, "time a few layers on this CPU, for some seconds", "plan")


GROUPS = (
    ModelOptions,
    TaskOptions,
    ESOptions,
    DecodingOptions,
    RewardOptions,
    EngineOptions,
    EvaluationOptions,
    RunOptions,
    PlanOptions,
)
