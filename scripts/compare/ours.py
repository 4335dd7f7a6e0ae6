"""This project: `rwkv_es.ES` as `rwkv-es train` uses it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rwkv_es import ES
from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .rates import falling
from .world import Answered, Asked

_HEAD = {"matrices": 1.0, "head.weight": 10.0}
_ALL = {"matrices": 1.0, "head.weight": 5.0, "emb.weight": 5.0}
GRID = [{"sigma": 3e-3, "lr": lr, "targets": _HEAD} for lr in (6e-3, 2e-2)]
GRID += [{"sigma": sigma, "lr": lr, "targets": _ALL} for sigma, lr in ((6e-3, 1e-2), (1e-2, 5e-2))]
GRID += [{"sigma": 2e-2, "lr": lr, "targets": _ALL, "prompts": 32} for lr in (0.1, 0.3)]
GRID += [{"sigma": 2e-2, "lr": lr, "targets": _ALL, "prompts": 32, "schedule": "cosine"} for lr in (0.3, 0.6)]
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
    """Try the step's members."""
    return Asked(members=state.es.ask(), model=state.es.model)


def tell(state: State, answered: Answered) -> State:
    """Take the step."""
    state.es.first_lr = state.settings["lr"] * falling(state.settings, answered.spent)
    state.es.tell(answered.rewards)
    return state


def params(state: State) -> Params:
    """Return the weights."""
    return state.es.model.params
