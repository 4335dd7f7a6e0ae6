"""Episodes: a model's answers and an environment's replies in turn, all read into one state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from rwkv_es.engine.decoding import Completion
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import cut
from rwkv_es.environment.play import Cut, Said
from rwkv_es.environment.pool import Environments
from rwkv_es.pretrained.tokenizer import Tokenizer
from rwkv_es.reward.sheet import MIN_ITEMS_FOR_LIMIT, Scores, too_many_failed
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.task import Problem
from rwkv_es.task.templates import without_blank_lines
from rwkv_es.task.turns import Setting

WAIT_S = 0.5  # for a reply, when nothing else is to do


class Turn(NamedTuple):
    """An answer, and what the environment said to it."""

    answer: str
    reply: str
    reward: float | None


@dataclass
class Episode:
    """What is known of an episode."""

    problem: Problem
    setting: Setting
    request: Request
    number: int = -1  # the environment's
    answers: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    text: str = ""  # everything that was read and written after the prompt
    last: list[int] = field(default_factory=list)  # tokens of the last answer
    num_sampled: int = 0
    num_replied: int = 0  # tokens
    finish: str = ""  # "done" | "turns" | "tokens" | "failed" | "broken"; "": under way
    error: str = ""
    cause: str = ""
    is_timeout: bool = False

    @property
    def reward(self) -> float | None:
        """What it has earned; a failure earns nothing. None: no reward applies."""
        if self.finish in ("failed", "broken"):
            return None if self.finish == "broken" else 0.0
        earned = [turn.reward for turn in self.turns]
        return None if None in earned else math.fsum(reward or 0.0 for reward in earned)

    @property
    def has_room(self) -> bool:
        """Whether another answer may follow."""
        limits = self.setting.limits
        return len(self.answers) < limits.turns and self.num_sampled + self.num_replied + 1 < limits.tokens

    def add_last(self, said: Said) -> None:
        """Add what its environment pays for an episode that a limit has ended."""
        if said.error:
            return self.fail(said.error, said.cause, is_timeout=said.is_timeout)
        last = self.turns[-1]
        reward = None if said.reward is None else (last.reward or 0.0) + said.reward
        self.turns[-1] = last._replace(reward=reward)

    def fail(self, error: str, cause: str, *, is_timeout: bool = False) -> None:
        """End it without a reward."""
        self.finish, self.error, self.cause, self.is_timeout = "failed", error, cause, is_timeout


NO_EPISODES: Mapping[int, Episode] = MappingProxyType({})


class Episodes:
    """The episodes of a rollout, by their places in the list of requests."""

    def __init__(
        self, environments: Environments | None, tokenizer: Tokenizer, episodes: Mapping[int, Episode]
    ) -> None:
        self.tokenizer, self.by_place = tokenizer, dict(episodes)
        self._environments = environments
        self._place_of: dict[int, int] = {}  # environments' numbers -> places; those that think

    def answered(self, ended: Mapping[int, Completion]) -> set[int]:
        """Hand answers to their environments. Returns the places whose states are to wait for a reply."""
        waiting = set()
        for place, completion in ended.items():
            episode = self.by_place.get(place)
            if episode is None:
                continue
            if completion.finish == "broken":
                episode.finish = "broken"
                self._forget(episode)
                continue
            self._hand_over(place, episode, completion.tokens)
            if episode.has_room:
                waiting.add(place)
        return waiting

    def replies(self, wait: bool = False) -> dict[int, Request | None]:
        """Return how the episodes go on whose environments have spoken, by place; None: not at all."""
        found: dict[int, Request | None] = {}
        for number, said in self.environments.poll(WAIT_S if wait else 0.0):
            place = self._place_of.pop(number, None)
            if place is not None:
                found[place] = self._next(place, self.by_place[place], said)
        return found

    def gather(self) -> dict[int, Episode]:
        """Wait for the last words of all environments. Returns the episodes by place."""
        while self._place_of:
            self.replies(wait=True)
        return self.by_place

    @property
    def environments(self) -> Environments:
        """The processes that think."""
        assert self._environments is not None, "there are no episodes without"
        return self._environments

    def _hand_over(self, place: int, episode: Episode, tokens: Sequence[int]) -> None:
        setting, data = episode.setting, self.tokenizer.decode(tokens)
        answer = setting.response_prefix + cut(data, setting.stop, setting.stop_included)
        if episode.answers:
            self.environments.answer(episode.number, answer)
        else:
            episode.number = self.environments.begin(episode.problem, answer)
        episode.answers.append(answer)
        episode.text += data
        episode.num_sampled, episode.last = episode.num_sampled + len(tokens), list(tokens)
        self._place_of[episode.number] = place

    def _next(self, place: int, episode: Episode, said: Said) -> Request | None:
        """Take in what an environment said. Returns the next answer to generate, if there is one."""
        if episode.finish:
            episode.add_last(said)
            return None
        episode.turns.append(Turn(episode.answers[-1], said.text, said.reward))
        if said.error:
            episode.fail(said.error, said.cause, is_timeout=said.is_timeout)
        elif said.is_over:
            episode.finish = "done"
        elif not episode.has_room:
            self._cut(place, episode, "turns" if len(episode.answers) >= episode.setting.limits.turns else "tokens")
        else:
            return self._continued(place, episode, said.text)
        return None

    def _cut(self, place: int, episode: Episode, finish: str) -> None:
        """End an episode by a limit; its environment may pay for what there is."""
        episode.finish = finish
        self.environments.answer(episode.number, Cut.CUT)
        self._place_of[episode.number] = place

    def _continued(self, place: int, episode: Episode, reply: str) -> Request | None:
        try:
            unread, read, text = continuation(self.tokenizer, episode, reply)
        except ConfigError as error:
            episode.fail(str(error), str(error))
            self._forget(episode)
            return None
        left = episode.setting.limits.tokens - episode.num_sampled - episode.num_replied - len(read)
        if left < 1:
            self._cut(place, episode, "tokens")
            return None
        episode.num_replied += len(read)
        episode.text += text
        request = episode.request
        return request._replace(
            prompt=(*unread, *read),
            max_new_tokens=min(request.max_new_tokens, left),
            position=episode.num_sampled,
            shared_prefixes=(),
        )

    def _forget(self, episode: Episode) -> None:
        if episode.number >= 0:
            self.environments.forget(episode.number)


def continuation(tokenizer: Tokenizer, episode: Episode, reply: str) -> tuple[Sequence[int], Sequence[int], str]:
    """Return what is to be read before the next answer: the last token of the last one, the reply's tokens, their text.

    What the model wrote itself of the template's next turn, such as the "User:" that ended its answer, is not read
    twice. An end token is not read, unless there is nothing else.

    Raises:
        ConfigError: the vocabulary cannot express the reply.
    """
    before, _, after = episode.setting.turn.partition("{q}")
    reply = without_blank_lines(reply) if before else reply
    tokens, head = episode.last, before.encode()
    if tokens[-1] == tokenizer.end_id:
        read, text = _encoded(tokenizer, before + reply + after)
        return ([], read, text) if read else (tokens[-1:], [], "")
    if not before:  # of which the model could have written something
        return tokens[-1:], *_encoded(tokenizer, reply + after)
    data = [tokenizer.token_bytes[token] for token in tokens]
    for unread in (tokens[-1:], []):  # without the last token, if that goes beyond what the turn begins with
        written = _after_answer(b"".join(data), b"".join(data if unread else data[:-1]), episode.setting.stop)
        if written is not None and head.startswith(written):
            return unread, *_encoded(tokenizer, head[len(written) :].decode("utf-8", "ignore") + reply + after)
    return tokens[-1:], *_encoded(tokenizer, before + reply + after)


@lru_cache(maxsize=1024)  # many environments have few replies
def _encoded(tokenizer: Tokenizer, text: str) -> tuple[Sequence[int], str]:
    """Return a text's tokens, and what they say."""
    tokens = tokenizer.encode(text)
    return tokens, tokenizer.decode(tokens)


def _after_answer(data: bytes, read: bytes, stop: Sequence[str]) -> bytes | None:
    """Return what was read of the stop string that ended an answer, and behind it; None: no such string."""
    place = min((data.index(string.encode()) for string in stop if string.encode() in data), default=None)
    return read[place:] if place is not None and place < len(read) else None


def begun(
    requests: Sequence[Request], problems: Sequence[Problem], settings: Sequence[Setting | None]
) -> dict[int, Episode]:
    """Return the episodes among requests, by place: those whose problem has a setting."""
    asked = enumerate(zip(requests, problems, settings, strict=True))
    return {i: Episode(problem, setting, request) for i, (request, problem, setting) in asked if setting is not None}


def with_episodes(scores: Scores, episodes: Mapping[int, Episode], error_limit: float) -> Scores:
    """Return scores with the rewards and failures of episodes in their places.

    Raises:
        RewardError: of 16 episodes or more, a larger share than `error_limit` failed.
    """
    failed = {place: episode for place, episode in sorted(episodes.items()) if episode.finish == "failed"}
    timeouts = sum(episode.is_timeout for episode in failed.values())
    rewards = [episodes[i].reward if i in episodes else reward for i, reward in enumerate(scores.rewards)]
    causes = {**scores.causes, **{place: episode.cause for place, episode in failed.items()}}
    first_error = scores.first_error or next((episode.error for episode in failed.values()), "")
    found = scores._replace(
        rewards=rewards,
        errors=scores.errors + len(failed) - timeouts,
        timeouts=scores.timeouts + timeouts,
        first_error=first_error,
        causes=dict(sorted(causes.items())),
    )
    if len(episodes) >= MIN_ITEMS_FOR_LIMIT and len(failed) > error_limit * len(episodes):
        raise too_many_failed(len(failed), timeouts, len(episodes), error_limit, found)
    return found
