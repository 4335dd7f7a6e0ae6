"""Answers that are scored in one go, and what is known of them."""

from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import NamedTuple

from rwkv_es.reward.adapters import Answer
from rwkv_es.reward.process import Unit
from rwkv_es.reward.worker import NO_LOGS, Result
from rwkv_es.system.errors import RewardError

TRIES = 3  # with an answer whose worker ends, and with workers that are killed before they are ready
MIN_ITEMS_FOR_LIMIT = 16
_SHOWN = 60  # characters of either end of a text
NO_CAUSES: Mapping[int, str] = MappingProxyType({})


class Group(NamedTuple):
    """Answers that a reward which compares sees together, of one process."""

    name: Hashable
    size: int


class Scores(NamedTuple):
    """Rewards in the order of the texts. None: the scorer reported "not applicable". Failures score 0.0."""

    rewards: list[float | None]
    errors: int
    timeouts: int
    first_error: str  # what the first failure in the order of the texts is, and on which text; "" without failures
    metrics: Mapping[str, float] = NO_LOGS  # what the rewards log, averaged over the texts that have it
    causes: Mapping[int, str] = NO_CAUSES  # of the failures, in one line each, by their places in `rewards`

    @property
    def first_cause(self) -> str:
        """The first failure in one line; "" without failures."""
        return self.causes[min(self.causes)] if self.causes else ""


def too_many_failed(num_failed: float, timeouts: float, size: float, limit: float, scores: Scores) -> RewardError:
    """Return the error of a reward that failed too often, with the first failure that `scores` know of."""
    first = f"The first failure: {scores.first_cause}" if scores.causes else "None of them here."
    return RewardError(
        f"the reward failed on {num_failed:g} of {size:g} answers, {timeouts:g} of them out of time; the limit is "
        f"{limit:.0%}. Mend the reward, or raise reward_error_limit or reward_timeout. {first}"
    )


class Sheet:
    """Answers that are scored in one go, by their places, and what is known of them."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.waiting: deque[Unit] = deque()  # no worker has them
        self.results: dict[int, Result] = {}
        self.num_failed = 0
        self._incomplete: dict[Hashable, Unit] = {}
        self._losses: Counter[int] = Counter()

    def add(self, place: int, answer: Answer, group: Group | None) -> None:
        """Let an answer wait, with the others of its group when all of it are there."""
        self.answers[place] = answer
        unit = [place] if group is None else [*self._incomplete.pop(group.name, []), place]
        if group is None or len(unit) == group.size:
            self.waiting.append(sorted(unit))
        else:
            self._incomplete[group.name] = unit

    def close_groups(self) -> None:
        """Take groups as they are, and the units in the order of their places."""
        self.waiting = deque(sorted([*self.waiting, *map(sorted, self._incomplete.values())]))
        self._incomplete = {}

    def next_units(self, count: int, compares: bool) -> list[Unit]:
        """Take units off the waiting ones, for a scorer that compares or not."""
        units = [self.waiting.popleft() for _ in range(count)]
        return units if compares else [[place] for unit in units for place in unit]

    def put(self, unit: Unit, results: Sequence[Result] | None) -> None:
        """Note the results; None: they could not be scored together, so each waits to be scored alone."""
        if results is None:
            self.waiting.extendleft([place] for place in reversed(unit))
            return
        for place, result in zip(unit, results, strict=True):
            self.results[place] = result
            self.num_failed += bool(result.error)

    def lose(self, unit: Unit, failure: Result) -> None:
        """Note that a worker has ended with the unit: it may be somebody else's fault, unless it took too long."""
        if len(unit) > 1:
            self.put(unit, None)
            return
        self._losses[unit[0]] += 1
        if failure.is_timeout or self._losses[unit[0]] >= TRIES:
            self.put(unit, [failure])
        else:
            self.waiting.appendleft(unit)

    def is_complete(self, error_limit: float) -> bool:
        """Say whether all is scored. Raises RewardError as soon as the failures are too many for all answers."""
        size = len(self.answers)
        if size >= MIN_ITEMS_FOR_LIMIT and self.num_failed > error_limit * size:
            scores = self.scores()
            raise too_many_failed(self.num_failed, scores.timeouts, size, error_limit, scores)
        return len(self.results) == size

    def _explained(self, place: int) -> str:
        """Say what failed, and on which answer."""
        answer = self.answers[place]
        return f"{self.results[place].error}\non the answer {_ends(answer.text)} to {_ends(answer.problem.prompt)}"

    def scores(self) -> Scores:
        """Return what is known so far, in the order of the places."""
        known = [self.results[place] for place in sorted(self.results)]
        failed = [result for result in known if result.error]
        timeouts = sum(result.is_timeout for result in failed)
        first_error = next((self._explained(place) for place in sorted(self.results) if self.results[place].error), "")
        causes = {place: result.cause for place, result in enumerate(known) if result.error}
        rewards = [result.reward for result in known]
        return Scores(rewards, len(failed) - timeouts, timeouts, first_error, _averages(known), causes)


def _ends(text: str) -> str:
    return repr(text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}")


def _averages(results: Sequence[Result]) -> dict[str, float]:
    names = sorted({name for result in results for name in result.logs})
    return {name: fmean(result.logs[name] for result in results if name in result.logs) for name in names}
