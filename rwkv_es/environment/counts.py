"""What is counted of episodes."""

from collections.abc import Iterable
from typing import NamedTuple

from rwkv_es.environment.episodes import Episode


class EpisodeCounts(NamedTuple):
    """Sums over episodes."""

    episodes: float = 0.0  # answers of many turns
    turns: float = 0.0
    episode_tokens: float = 0.0  # of answers and replies
    episodes_failed: float = 0.0  # by their environment
    episodes_cut: float = 0.0  # by a limit


def counts_of(episodes: Iterable[Episode]) -> EpisodeCounts:
    """Count episodes."""
    found = list(episodes)
    return EpisodeCounts(
        len(found),
        sum(len(episode.turns) for episode in found),
        sum(episode.num_sampled + episode.num_replied for episode in found),
        sum(episode.finish == "failed" for episode in found),
        sum(episode.finish in ("turns", "tokens") for episode in found),
    )


def lengths_of(counted: EpisodeCounts) -> dict[str, float]:
    """Say how long the episodes are, and how many did not come to an end of their own; nothing if there are none."""
    if not counted.episodes:
        return {}
    return {
        "turns_per_episode": counted.turns / counted.episodes,
        "tokens_per_episode": counted.episode_tokens / counted.episodes,
        "episodes_failed": counted.episodes_failed,
        "episodes_cut": counted.episodes_cut,
    }
