"""Rewards (N,P) to fitness (N,): N members answer the same P problems; NaN marks a missing reward."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def combine(rewards: Tensor, objective: str, votes: Sequence[str] = ()) -> Tensor:
    """Make one reward of the samples of each member and problem: (N,P,K) -> (N,P), NaN where all are missing.

    mean: their average; pass: the best one; maj: the average of those that the most samples agree on, by their `votes`
    (N*P*K; "" votes for nothing), so that a tie is shared.
    """
    if objective == "maj":
        return _majority(rewards, votes)
    if objective == "pass":
        best = rewards.nan_to_num(nan=-torch.inf).amax(-1)
        return torch.where(rewards.isnan().all(-1), torch.nan, best)
    return rewards.nanmean(-1)


def _majority(rewards: Tensor, votes: Sequence[str]) -> Tensor:
    *outer, num_samples = rewards.shape
    rows = rewards.reshape(-1, num_samples).tolist()
    agreed = []
    for row, values in enumerate(rows):
        cast = votes[row * num_samples : (row + 1) * num_samples]
        ballot = [(vote, value) for vote, value in zip(cast, values, strict=True) if not math.isnan(value)]
        counts = Counter(vote for vote, _ in ballot if vote) or Counter(vote for vote, _ in ballot)
        most = max(counts.values(), default=0)
        winners = [value for vote, value in ballot if counts[vote] == most]
        agreed.append(sum(winners) / len(winners) if winners else torch.nan)
    return torch.tensor(agreed, dtype=rewards.dtype).reshape(outer)


def shape(rewards: Tensor, method: str) -> Tensor:
    """Shape rewards (N,P) into fitness (N,), float64. No signal, no fitness: then every entry is exactly 0.

    A NaN reward is left out of the means; a member without any reward has fitness 0.
    """
    rewards = rewards.double()
    if not has_signal(rewards).any():
        return torch.zeros(len(rewards), dtype=torch.float64)
    return torch.nan_to_num(SHAPINGS[method](rewards))


def has_signal(rewards: Tensor) -> Tensor:
    """Say for each problem whether its rewards differ between members: (N,P) -> (P,) bool."""
    missing = rewards.isnan()
    highest = rewards.masked_fill(missing, -torch.inf).amax(0)
    lowest = rewards.masked_fill(missing, torch.inf).amin(0)
    return highest > lowest


def centred(rewards: Tensor) -> Tensor:
    """Subtract each problem's mean over members, then average over problems: (N,P) -> (N,)."""
    return _centre(rewards).nanmean(1)


def zscore(rewards: Tensor) -> Tensor:
    """Centre each problem, divide by the standard deviation of the whole matrix (EGGROLL, eq. 6.3): (N,P) -> (N,)."""
    deviations = _centre(rewards)
    return deviations.nanmean(1) / deviations.square().nanmean().sqrt()


def rank(rewards: Tensor) -> Tensor:
    """Replace the centred averages by their ranks, spread over [-1/2, 1/2]; ties share theirs: (N,P) -> (N,)."""
    average = centred(rewards)
    valid = average[~average.isnan()]
    below = (valid[None, :] < average[:, None]).sum(1)
    ties = (valid[None, :] == average[:, None]).sum(1)
    ranks = (below + (ties - 1) / 2) / max(len(valid) - 1, 1) - 0.5
    return torch.where(average.isnan(), torch.nan, ranks)


def sign(rewards: Tensor) -> Tensor:
    """Give the better member of each mirrored pair 1 and the other -1, both 0 at a tie: (N,P) -> (N,)."""
    even, odd = rewards[0::2], rewards[1::2]
    better = (even - odd).nanmean(1).sign()  # over the problems that both have a reward for
    return torch.stack((better, -better), 1).flatten()


def raw(rewards: Tensor) -> Tensor:
    """Average over problems: (N,P) -> (N,)."""
    return rewards.nanmean(1)


SHAPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "zscore": zscore,
    "centered": centred,
    "rank": rank,
    "sign": sign,
    "raw": raw,
}


def _centre(rewards: Tensor) -> Tensor:
    return rewards - rewards.nanmean(0)
