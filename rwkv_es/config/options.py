"""All options of all commands: fields of `Config` = command-line flags = keys of a YAML or TOML file (flags win)."""

import math
from collections.abc import Container, Mapping
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rwkv_es.config.groups import (
    DecodingOptions,
    EngineOptions,
    ESOptions,
    EvaluationOptions,
    ModelOptions,
    PlanOptions,
    RewardOptions,
    RunOptions,
    TaskOptions,
)
from rwkv_es.config.objective import objective_of
from rwkv_es.config.option import MOST_ANSWERS, check, convert, nearest
from rwkv_es.system.errors import ConfigError

PROVENANCE = "made_with"  # the key of a run folder's config.yaml that is no option: versions and the base checkpoint


@dataclass(frozen=True)
class Config(
    PlanOptions,  # a dataclass collects its bases' fields from the last one to the first
    RunOptions,
    EvaluationOptions,
    EngineOptions,
    RewardOptions,
    DecodingOptions,
    ESOptions,
    TaskOptions,
    ModelOptions,
):
    """Every option with its default. Construction validates; an instance is always usable.

    Raises:
        ConfigError: a value is out of range or does not fit another one.
    """

    def __post_init__(self) -> None:
        for f in fields(self):
            check(f, getattr(self, f.name))
        _check_together(self)
        _check_targets(self.targets)


FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Config)}
_VERBS = ("train", "eval", "generate", "chat", "doctor", "export", "replay", "fork")
OPTIONS: dict[str, tuple[str, ...]] = {
    verb: tuple(name for name, f in FIELDS.items() if verb in f.metadata["verbs"]) for verb in _VERBS
}
OPTIONS["resume"] = OPTIONS["train"]
OPTIONS["plan"] = (*OPTIONS["train"], *(f.name for f in fields(PlanOptions)))


FORMER = {f.metadata["formerly"]: name for name, f in FIELDS.items() if f.metadata["formerly"]}


def with_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which those that bear the name of an earlier release have today's.

    Raises:
        ConfigError: an option stands there under both.
    """
    for former, name in FORMER.items():
        if former in values:
            refuse_both_names(former, name, values)
    return {FORMER.get(name, name): value for name, value in values.items()}


def refuse_both_names(former: str, name: str, given: Container[str]) -> None:
    """Refuse an option that is given under its former name and under today's.

    Raises:
        ConfigError: it is.
    """
    if name in given:
        raise ConfigError(f"{former} is the former name of {name}; give one of them")


def _check_together(config: Config) -> None:
    if config.population % 2:
        raise ConfigError(
            f"population must be even (members come in mirrored pairs); got {config.population}, "
            f"try {config.population + 1}"
        )
    if (answers := config.population * config.prompts * config.samples) > MOST_ANSWERS:
        raise ConfigError(
            f"population {config.population} x prompts {config.prompts} x samples {config.samples} are {answers:,} "
            f"answers a step; at most {MOST_ANSWERS:,} can be asked for"
        )
    objective = objective_of(config.objective)
    if objective.samples in ("pass", "maj") and config.samples == 1:
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
    values = with_todays_names(values)
    for name in values:
        if name not in OPTIONS[verb]:
            raise ConfigError(f"unknown option {name!r} for {verb}; {nearest(str(name), OPTIONS[verb])}")
    return Config(**{name: convert(FIELDS[name], value) for name, value in values.items()})


def model_name(path: str | Path) -> str:
    """Return a checkpoint's file name without .pth or .safetensors (its own dots stay: rwkv7-g1j-1.5b-...).

    Of a directory in the Hugging Face cache (models--OWNER--NAME/snapshots/HASH), NAME.
    """
    parts = Path(path).parts
    in_cache = len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--")
    name = parts[-3].rpartition("--")[2] if in_cache else Path(path).name
    return name.removesuffix(".pth").removesuffix(".safetensors")


def to_dict(config: Config, verb: str = "train") -> dict[str, Any]:
    """Return the options of a verb as plain values, in order, ready for YAML."""
    values = asdict(config)
    return {name: values[name] for name in OPTIONS[verb]}
