"""This project: `rwkv_es.ES` as `rwkv-es train` uses it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rwkv_es import ES
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .rates import falling
from .vectors import NORMS
from .world import Answered, Asked

_HEAD = {"matrices": 1.0, "head.weight": 10.0}
_ALL = {"matrices": 1.0, "head.weight": 5.0, "emb.weight": 5.0}
_NORMS = dict.fromkeys(NORMS, 1.0)
GRID: list[dict[str, Any]] = [{"sigma": 3e-3, "lr": 6e-3, "targets": _HEAD}]
GRID += [{"sigma": 3e-3, "lr": 2e-2, "targets": _HEAD, "prompts": p, "schedule": "cosine"} for p in (4, 8)]
GRID += [{"sigma": 2e-2, "lr": 0.3, "targets": _ALL, "prompts": 32}]
GRID += [
    {"sigma": 2e-2, "lr": lr, "targets": _ALL, "population": population, "schedule": "cosine"}
    for lr, population in ((0.3, 256), (0.6, 512))
]
GRID += [
    {"sigma": sigma, "lr": 10 * sigma, "targets": _NORMS, "prompts": 16, "schedule": "cosine"} for sigma in (0.1, 0.15)
]
DEFAULTS: Mapping[str, Any] = {"population": 64, "prompts": 8}
_OURS = ("population", "sigma", "lr", "rank", "targets", "fitness", "optimizer", "momentum", "weight_decay")


class State(NamedTuple):
    """The strategy, whose weights move in place."""

    es: ES
    settings: Mapping[str, Any]


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base."""
    own = model._replace(params={name: tensor.clone() for name, tensor in model.params.items()})
    return State(ES(own, seed=seed, **{name: settings[name] for name in _OURS if name in settings}), settings)


def ask(state: State) -> Asked:
    """Try the step's members; they answer greedily unless the settings say `temperature`."""
    return Asked(members=state.es.ask(), model=state.es.model, temperature=state.settings.get("temperature", 0.0))


def tell(state: State, answered: Answered) -> State:
    """Take the step."""
    state.es.first_lr = state.settings["lr"] * falling(state.settings, answered.spent)
    state.es.tell(answered.rewards)
    return state


def params(state: State) -> Params:
    """Return the weights."""
    return state.es.model.params
