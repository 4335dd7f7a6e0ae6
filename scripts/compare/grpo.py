"""GRPO (arXiv 2402.03300): group-relative advantages, clipped, AdamW, no KL term; sampled by our engine."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from .gradients import ROW_TOKENS, Texts, clipped, optimiser, read, rows, step_, trainable
from .world import Answered, Asked

GRID = [{"lr": lr, "epochs": 1} for lr in (3e-4, 1e-3, 3e-3)]
GRID += [{"lr": lr, "epochs": 3} for lr in (3e-4, 1e-3)]
GRID += [{"lr": 1e-3, "epochs": 1, "prompts": 32}]
GRID += [{"lr": 3e-3, "epochs": 1, "schedule": "linear"}]
GRID += [{"lr": 1e-3, "epochs": 1, "prompts": 32, "schedule": "linear"}]  # TRL's default schedule
DEFAULTS: Mapping[str, Any] = {"prompts": 16, "samples": 8, "clip": 0.2}


class State(NamedTuple):
    """The policy and AdamW's moments, both moved in place."""

    model: Model
    policy: Params
    adam: torch.optim.AdamW
    settings: Mapping[str, Any]


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base."""
    policy = trainable(model.params)
    return State(model, policy, optimiser(list(policy.values()), settings), settings)


def ask(state: State) -> Asked:
    """Sample K answers to each problem at temperature 1."""
    own = state.model._replace(params=params(state))
    return Asked(model=own, samples=state.settings["samples"], temperature=1.0)


def tell(state: State, answered: Answered) -> State:
    """Take a few steps on the clipped surrogate; answers without advantage have no gradient and are left out."""
    advantage = advantages(answered.rewards, state.settings.get("dr", False)).flatten()
    places = [place for place, value in enumerate(advantage.tolist()) if value]
    most = state.settings.get("row_tokens", ROW_TOKENS)
    batches = list(rows(answered, places, most))
    with torch.no_grad():
        before = [read(state.policy, texts)[0] for texts in batches]
    for _ in range(state.settings["epochs"] if batches else 0):
        for texts, old in zip(batches, before):
            ratio = (read(state.policy, texts)[0] - old).exp()
            gain = clipped(ratio, advantage[texts.places, None].float(), state.settings["clip"])
            (-(gain * weights(texts, state.settings)).sum() / len(advantage)).backward()
        step_(state.adam, state.settings, answered.spent)
    return state


def params(state: State) -> Params:
    """Return the policy's weights."""
    return {name: tensor.detach() for name, tensor in state.policy.items()}


def advantages(rewards: Tensor, is_dr: bool) -> Tensor:
    """Centre each problem's rewards (P,K), and divide by their deviation unless it is Dr. GRPO."""
    deviations = rewards - rewards.mean(1, keepdim=True)
    return deviations if is_dr else deviations / (rewards.std(1, keepdim=True) + 1e-4)


def weights(texts: Texts, settings: Mapping[str, Any]) -> Tensor:
    """Weigh the tokens (B,T-1): each text's mean, or with Dr. GRPO (arXiv 2503.20783) one constant for all."""
    is_new = texts.is_new[:, 1:].float()
    return is_new / (settings["longest"] if settings.get("dr") else is_new.sum(1, keepdim=True))
