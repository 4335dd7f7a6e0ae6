"""PPO (arXiv 1707.06347): a value head on the policy's last hidden vectors, GAE, clipped, AdamW, no KL term."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.model.forward import Model
from rwkv_es.model.layout import Params

from . import grpo
from .gradients import ROW_TOKENS, Texts, clipped, optimiser, read, rows, step_, trainable
from .world import Answered, Asked

GRID = [{"lr": lr, "epochs": 1} for lr in (3e-4, 1e-3, 3e-3)]
GRID += [{"lr": lr, "epochs": 3} for lr in (3e-4, 1e-3)]
GRID += [{"lr": 1e-3, "epochs": 1, "prompts": 128}]
GRID += [{"lr": lr, "epochs": 1, "schedule": "linear"} for lr in (1e-3, 3e-3)]
DEFAULTS: Mapping[str, Any] = {"prompts": 64, "samples": 1, "clip": 0.2, "gae": 0.95, "value_weight": 0.1}


class State(NamedTuple):
    """The policy, the value head (C,), and AdamW's moments, all moved in place."""

    model: Model
    policy: Params
    value: Tensor
    adam: torch.optim.AdamW
    settings: Mapping[str, Any]


def start(model: Model, settings: Mapping[str, Any], seed: int) -> State:
    """Begin at the base, with values of 0."""
    policy = trainable(model.params)
    value = torch.zeros(len(policy["ln_out.weight"]), requires_grad=True)
    return State(model, policy, value, optimiser([*policy.values(), value], settings), settings)


def ask(state: State) -> Asked:
    """Sample answers at temperature 1."""
    own = state.model._replace(params=params(state))
    return Asked(model=own, samples=state.settings["samples"], temperature=1.0)


def tell(state: State, answered: Answered) -> State:
    """Take a few steps on the clipped surrogate and the squared error of the values."""
    rewards = answered.rewards.flatten().float()
    most = state.settings.get("row_tokens", ROW_TOKENS)
    batches = list(rows(answered, range(len(rewards)), most))
    before = [_before(state, texts, rewards) for texts in batches]
    every = torch.cat([advantage[texts.is_new[:, 1:]] for texts, (_, advantage, _) in zip(batches, before)])
    mean, deviation, count = every.mean(), every.std() + 1e-8, len(every)
    for _ in range(state.settings["epochs"]):
        for texts, (old, advantage, returns) in zip(batches, before):
            likelihood, hidden = read(state.policy, texts)
            whitened = (advantage - mean) / deviation
            gain = clipped((likelihood - old).exp(), whitened, state.settings["clip"])
            error = (hidden @ state.value - returns).square()
            loss = state.settings["value_weight"] * error - gain
            (loss[texts.is_new[:, 1:]].sum() / count).backward()
        step_(state.adam, state.settings, answered.spent)
    return state


params = grpo.params


@torch.no_grad()
def _before(state: State, texts: Texts, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, advantages and returns of the policy that has answered: (B,T-1) each."""
    likelihood, hidden = read(state.policy, texts)
    values, is_new = hidden @ state.value, texts.is_new[:, 1:]
    advantage = torch.zeros_like(values)
    for row, place in enumerate(texts.places):
        own = values[row][is_new[row]]
        advantage[row][is_new[row]] = advantage_of(own, float(rewards[place]), state.settings["gae"])
    return likelihood, advantage, advantage + values


def advantage_of(values: Tensor, reward: float, gae: float) -> Tensor:
    """Estimate advantages of an answer's tokens (arXiv 1506.02438), undiscounted, with one reward at the end: (T,)."""
    following = torch.cat((values[1:], values.new_zeros(1)))
    errors = (following - values).tolist()
    errors[-1] += reward
    found, carried = [], 0.0
    for error in reversed(errors):
        carried = error + gae * carried
        found.append(carried)
    return torch.tensor(found[::-1])
