"""Rewards (N,P) to fitness (N,): N members answer the same P problems; NaN marks a missing reward."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

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
    return rewards.sort(-1).values.nanmean(-1)  # in one order: equal samples give equal bits


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
        agreed.append(math.fsum(winners) / len(winners) if winners else torch.nan)
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


def centered(rewards: Tensor) -> Tensor:
    """Subtract each problem's mean over members, then average over problems: (N,P) -> (N,)."""
    return _centre(rewards).nanmean(1)


def zscore(rewards: Tensor) -> Tensor:
    """Centre each problem, divide by the standard deviation of the whole matrix (EGGROLL, eq. 6.3): (N,P) -> (N,)."""
    deviations = _centre(rewards)
    return deviations.nanmean(1) / deviations.square().nanmean().sqrt()


def rank(rewards: Tensor) -> Tensor:
    """Replace the centered averages by their ranks, spread over [-1/2, 1/2]; ties share theirs: (N,P) -> (N,).

    Averages that lie within the rounding of the rewards (see `_rounding`) of the next one are ties.
    """
    averages = _exact_averages(rewards)
    order = sorted((n for n, average in enumerate(averages) if not math.isnan(average)), key=averages.__getitem__)
    ranks = torch.full((len(rewards),), torch.nan, dtype=torch.float64)
    for start, end in _runs([averages[n] for n in order], _rounding(rewards)):
        ranks[order[start:end]] = (start + end - 1) / 2 / max(len(order) - 1, 1) - 0.5
    return ranks


def sign(rewards: Tensor) -> Tensor:
    """Give the better member of each mirrored pair 1 and the other -1, both 0 at a tie: (N,P) -> (N,).

    Compared are the problems that both have a reward for; sums within the rounding of the rewards are ties.
    """
    tie, better = _rounding(rewards), []
    for even, odd in zip(rewards[0::2].tolist(), rewards[1::2].tolist()):
        both = [(a, -b) for a, b in zip(even, odd) if not (math.isnan(a) or math.isnan(b))]
        ahead = math.fsum(value for pair in both for value in pair)
        better.append(0.0 if abs(ahead) <= tie * len(both) else math.copysign(1.0, ahead))
    first = torch.tensor(better, dtype=torch.float64)
    return torch.stack((first, -first), 1).flatten()


def raw(rewards: Tensor) -> Tensor:
    """Average over problems: (N,P) -> (N,)."""
    return rewards.nanmean(1)


SHAPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "zscore": zscore,
    "centered": centered,
    "rank": rank,
    "sign": sign,
    "raw": raw,
}


def _centre(rewards: Tensor) -> Tensor:
    return rewards - rewards.nanmean(0)


def _exact_averages(rewards: Tensor) -> list[float]:
    """Average the centered rewards of each member, rounded once: the order of the problems changes nothing."""
    columns = [[value for value in column if not math.isnan(value)] for column in rewards.T.tolist()]
    means = [math.fsum(column) / len(column) if column else math.nan for column in columns]
    rows = ([(r, -m) for r, m in zip(row, means) if not math.isnan(r)] for row in rewards.tolist())
    return [math.fsum(part for pair in row for part in pair) / len(row) if row else math.nan for row in rows]


def _rounding(rewards: Tensor) -> float:
    """Return by how much two rewards that should be equal may differ, as 0.1 + 0.2 and 0.3: 2^-50 of the largest."""
    return 2.0**-50 * rewards.nan_to_num(nan=0.0).abs().max().item()


def _runs(ascending: Sequence[float], gap: float) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of values of which neighbours differ by no more than `gap`."""
    start = 0
    for end in range(1, len(ascending) + 1):
        if end == len(ascending) or ascending[end] - ascending[end - 1] > gap:
            yield start, end
            start = end
