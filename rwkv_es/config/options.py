"""The one list of options: fields of `Config` = command-line flags = keys of a YAML or TOML file (flags win)."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rwkv_es.errors import ConfigError

DEFAULT_TARGETS = {"matrices": 1.0}
CHOICES: dict[str, tuple[str, ...]] = {
    "fitness": ("zscore", "centered", "rank", "sign", "raw"),
    "optimizer": ("sgd", "momentum", "adam"),
    "schedule": ("constant", "linear", "cosine"),
    "master": ("fp32", "stochastic"),
    "engine": ("auto", "torch", "numba", "triton"),
    "dtype": ("auto", "fp32", "bf16"),
    "quantize": ("none", "int8"),
    "state_dtype": ("fp32", "fp16"),
    "resume": ("auto", "never"),
    "split": ("train", "test"),
    "reward_signature": ("auto", "task", "plain", "trl", "trl_messages", "verl"),
    "objective": ("mean", "pass", "maj"),
    "weights": ("best", "last"),
    "tracker": ("auto", "none", "tensorboard", "wandb", "trackio"),
}


def _option(default: Any, help_text: str, factory: bool = False) -> Any:
    metadata = {"help": help_text}
    return field(default_factory=default, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every option with its default. Construction validates; an instance is always usable.

    Raises:
        ConfigError: a value is out of range or does not fit another one.
    """

    model: str = _option("tiny", 'checkpoint (.pth or .safetensors), or "tiny": the embedded one')
    tokenizer: str = _option("auto", '"auto" (a tokenizer.json beside the model, else World), "world", or a JSON file')
    task: str = _option("countdown_mini", "built-in task, path to your own folder or .py file, or a mixture: a=1,b=2")
    data: str = _option("", "the task's data: local file or folder (default: its own source); of a mixture a=PATH,...")
    template: str = _option("auto", "prompt template (chat, think, short_think, ..., raw); auto: the task's own")
    system: str = _option("", "system text before the first turn (templates system, chat, think, short_think)")
    shots: str = _option("0", "solved training problems shown before each question, or a text file shown instead")
    bos: bool = _option(False, "start every prompt with token 0")
    run: str = _option("", "run folder (default: runs/<task>-<model>-seed<seed>)")
    resume: str = _option("auto", "auto: continue a run found in the folder; never: refuse a folder that has one")
    seed: int = _option(0, "seed of noise, sampling and problem order")
    steps: int = _option(100, "training steps")
    population: int = _option(256, "members per step (even: they come in mirrored pairs)")
    prompts: int = _option(8, "problems that every member answers in a step")
    samples: int = _option(1, "completions per member and problem; eval: answers besides the greedy one")
    sigma: float = _option(1e-3, "noise scale")
    rank: int = _option(1, "rank of a perturbation")
    lr: float = _option(1e-3, "learning rate alpha of W += alpha/N * sum f*eps")
    schedule: str = _option("constant", "decay of the learning rate over the steps")
    schedule_end: float = _option(0.1, "fraction of lr (and of sigma with sigma_decay) reached at the last step")
    sigma_decay: bool = _option(False, "let sigma follow the schedule too")
    targets: Mapping[str, float] = _option(
        lambda: dict(DEFAULT_TARGETS),
        "what is perturbed: name=multiplier,...; a name is matrices, vectors, state, or a pattern like head.weight",
        factory=True,
    )
    objective: str = _option("mean", "what counts of the samples: mean, pass (the best one), maj (the majority's)")
    fitness: str = _option("zscore", "shaping of rewards into fitness")
    optimizer: str = _option("sgd", "optimiser on the ES gradient")
    momentum: float = _option(0.9, "momentum, and Adam's beta1")
    weight_decay: float = _option(0.0, "anchored decay: W -= lr * weight_decay * (W - W0)")
    master: str = _option("fp32", "bf16 weights: keep an fp32 master copy, or round stochastically")
    dtype: str = _option("auto", "dtype of the weights in the engine; auto: the file's (bf16 becomes fp32 on a CPU)")
    quantize: str = _option("none", "int8: large matrices in 8 bits, steps rounded stochastically to their grid")
    state_dtype: str = _option(
        "fp32", "how states are stored; fp16: half the memory, logits move by 5e-4 of their size"
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...")
    engine: str = _option(
        "auto", "numba: fused CPU kernels; triton: GPU ones, untried; torch: anywhere; auto: numba or torch"
    )
    threads: int = _option(0, "CPU threads (0: all cores)")
    slots: int = _option(256, "generations in flight")
    max_new: int = _option(0, "longest completion in tokens (0: the task's own)")
    temperature: float = _option(0.0, "sampling temperature; 0 is greedy")
    top_p: float = _option(1.0, "nucleus sampling: smallest set of tokens with this probability")
    top_k: int = _option(0, "sample among the k likeliest tokens (0: all)")
    eval_every: int = _option(10, "held-out evaluation every k steps (0: never)")
    patience: int = _option(0, "stop after this many held-out evaluations in a row without a better one (0: never)")
    eval_size: int = _option(200, "held-out problems per evaluation (0: all)")
    snapshot_every: int = _option(10, "snapshot of the weights every k steps")
    keep: int = _option(2, "snapshots kept besides the best one")
    reward: str = _option("", "your rewards with weights: file.py:fn=0.7,pkg.mod:fn=0.3 (default: the task's own)")
    reward_signature: str = _option("auto", "how a reward of yours is called; auto: told by its parameters' names")
    reward_workers: int = _option(1, "processes that score answers (0: in this process, without time limits)")
    reward_timeout: float = _option(5.0, "seconds for one answer before its worker is killed")
    reward_error_limit: float = _option(0.5, "stop when more than this share of rewards fails")
    tracker: str = _option("auto", "where scalars go besides metrics.jsonl; auto: TensorBoard where it is installed")
    rank_timeout: float = _option(600.0, "seconds that processes wait for one that is silent before all end")
    checksum_every: int = _option(10, "compare the weights of all processes every k steps")
    split: str = _option("test", "which split to evaluate")
    base: str = _option("", "eval: a second checkpoint to compare the model with, on the same problems or text")
    text: str = _option("", "eval: read this UTF-8 text instead of a task: perplexity, and KL to the base")
    state: str = _option("", "file with an initial state (blocks.*.att.time_state) to start every text from")
    prompt: str = _option("", "generate: the question to answer")
    weights: str = _option("best", "export: which weights of the run")
    step: int = _option(-1, "number of steps taken (replay: -1 verifies every step)")
    out: str = _option("", "output file; fork: the new run's folder")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_ranges(self)
        _check_targets(self.targets)


_SIZES = ("population", "prompts", "samples", "rank", "slots", "keep", "snapshot_every", "checksum_every")
_POSITIVE = (*_SIZES, "sigma", "lr", "reward_timeout", "rank_timeout")
_COUNTS = ("seed", "steps", "threads", "max_new", "top_k", "eval_every", "eval_size", "patience", "reward_workers")
_NOT_NEGATIVE = (*_COUNTS, "momentum", "weight_decay", "temperature")
_FRACTION = ("top_p", "schedule_end", "reward_error_limit")
_ENGINE = ("dtype", "quantize", "state_dtype", "device", "engine", "threads", "slots", "max_new")
_PROMPTING = ("template", "system", "shots", "bos")
_COMMON = ("model", "tokenizer", "task", "data", *_PROMPTING, "seed", *_ENGINE)
_CHAT = ("model", "tokenizer", "template", "system", "bos", "state", "seed", "dtype", "device", "threads", "max_new")
_NOISE = ("sigma", "rank", "targets")
_SAMPLING = ("temperature", "top_p", "top_k")
_REWARD = ("reward", "reward_signature", "reward_workers", "reward_timeout", "reward_error_limit")
_NOT_TRAIN = {"split", "base", "text", "state", "prompt", "weights", "step", "out"}

OPTIONS: dict[str, tuple[str, ...]] = {
    "train": tuple(f.name for f in fields(Config) if f.name not in _NOT_TRAIN),
    "eval": (*_COMMON, "state", *_SAMPLING, *_REWARD, "split", "eval_size", "samples", "base", "text", "out"),
    "generate": (*(n for n in _COMMON if n not in ("data", "slots")), *_SAMPLING, "prompt", "samples", "state"),
    "chat": (*_CHAT, *_SAMPLING),
    "doctor": (*_COMMON, *_SAMPLING, *_REWARD, "eval_size", "prompts", "samples", "objective", *_NOISE),
    "export": ("run", "weights", "out"),
    "replay": ("run", "step"),
    "fork": ("run", "step", "out"),
}
PROVENANCE = "made_with"  # the key of a run folder's config.yaml that is no option: versions and the base checkpoint


def _check_choices(config: Config) -> None:
    for name, allowed in CHOICES.items():
        value = getattr(config, name)
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _check_ranges(config: Config) -> None:
    for name in _POSITIVE:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be above 0; got {getattr(config, name)}")
    for name in _NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must not be negative; got {getattr(config, name)}")
    for name in _FRACTION:
        if not 0 < getattr(config, name) <= 1:
            raise ConfigError(f"{name} must lie in (0, 1]; got {getattr(config, name)}")
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{f.name} must be a finite number; got {value}")
    if config.population % 2:
        raise ConfigError(
            f"population must be even (members come in mirrored pairs); got {config.population}, "
            f"try {config.population + 1}"
        )
    if config.objective != "mean" and config.samples == 1:
        raise ConfigError(f"objective {config.objective} compares samples, and there is one; try samples 4")
    if config.momentum >= 1:
        raise ConfigError(f"momentum must be below 1; got {config.momentum}")


def _check_targets(targets: Mapping[str, float]) -> None:
    if not targets:
        raise ConfigError("targets is empty, so nothing would be trained; try matrices=1")
    for pattern, multiplier in targets.items():
        if not (multiplier > 0 and math.isfinite(multiplier)):
            raise ConfigError(f"the multiplier of target {pattern!r} must be a number above 0; got {multiplier}")


def build(values: Mapping[str, Any], verb: str = "train") -> Config:
    """Make a `Config` from option values (strings or parsed), each converted to its field's type.

    Raises:
        ConfigError: unknown key (the nearest name is suggested), or a value of the wrong type or range.
    """
    defaults = {f.name: _default(f) for f in fields(Config)}
    for name in values:
        if name not in OPTIONS[verb]:
            raise ConfigError(f"unknown option {name!r} for {verb}; {nearest(str(name), OPTIONS[verb])}")
    return Config(**{name: _convert(name, value, defaults[name]) for name, value in values.items()})


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the allowed one that is meant, or all of them."""
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]}?" if close else f"it may be {', '.join(allowed)}"


def run_folder(config: Config) -> Path:
    """Return the run's folder: `config.run`, or runs/<task>-<model>-seed<seed>."""
    if config.run:
        return Path(config.run)
    tasks = [Path(part.rpartition("=")[0] or part).name.removesuffix(".py") for part in config.task.split(",")]
    return Path("runs", f"{'+'.join(tasks).replace(':', '-')}-{model_name(config.model)}-seed{config.seed}")


def model_name(path: str | Path) -> str:
    """Return a checkpoint's file name without .pth or .safetensors (its own dots stay: rwkv7-g1j-1.5b-...)."""
    return Path(path).name.removesuffix(".pth").removesuffix(".safetensors")


def to_dict(config: Config, verb: str = "train") -> dict[str, Any]:
    """Return the options of a verb as plain values, in order, ready for YAML."""
    values = asdict(config)
    return {name: values[name] for name in OPTIONS[verb]}


def _default(f: Any) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()


def _convert(name: str, value: Any, default: Any) -> Any:
    """Convert a flag's string or a file's value to the type of the option's default."""
    convert, wanted = _CONVERTERS[type(default)]
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be {wanted}; got {value!r}") from None


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def _to_str(value: Any) -> str:
    if not isinstance(value, (str, Path)):
        raise ValueError
    return str(value)


def _to_targets(value: Any) -> dict[str, float]:
    is_mapping = isinstance(value, Mapping)
    pairs = list(value.items() if is_mapping else (part.split("=") for part in _to_str(value).split(",")))
    targets = {str(name).strip(): _to_float(multiplier) for name, multiplier in pairs}
    if len(targets) < len(pairs):
        raise ValueError
    return targets


_CONVERTERS: dict[type, tuple[Callable[[Any], Any], str]] = {
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
    bool: (_to_bool, "true or false"),
    str: (_to_str, "text"),
    dict: (_to_targets, "name=multiplier,name=multiplier with each name once"),
}
