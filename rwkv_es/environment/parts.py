"""How the problems of a task are asked: the whole task, or a part of a mixture; which answers are scored together."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from rwkv_es.config.options import Config
from rwkv_es.engine.scheduler import Request
from rwkv_es.engine.stops import Stops, cut, make_stops
from rwkv_es.pretrained.tokenizer import Tokenizer
from rwkv_es.reward.sheet import Group
from rwkv_es.task.prompts import Prompting, response_prefix_of, stops_of, turn_of
from rwkv_es.task.task import Task
from rwkv_es.task.turns import Setting, given_limits, limited


class Part(NamedTuple):
    """How the problems of one task are asked: the whole task, or a part of a mixture."""

    response_prefix: str
    stop: tuple[str, ...]  # an answer ends before them
    stop_included: tuple[str, ...]  # and after these
    stops: Stops
    max_new_tokens: int
    setting: Setting | None = None  # of its episodes, if it has an environment

    @property
    def longest(self) -> int:
        """The most tokens after a prompt."""
        return self.max_new_tokens if self.setting is None else self.setting.limits.tokens


def part_of_task(task: Task, tokenizer: Tokenizer, prompting: Prompting, config: Config) -> Part:
    """Return how a task's problems are asked, by its constants and the options."""
    strings, longest = stops_of(task, prompting), config.max_new_tokens or task.max_new_tokens
    stops = make_stops(tokenizer, (*strings, *task.stop_included))
    part = Part(response_prefix_of(task, prompting), strings, task.stop_included, stops, longest)
    if task.environment is None:
        return part
    limits = limited(task.limits, longest, given_limits(config))
    setting = Setting(*part[:3], turn_of(task, prompting), limits)
    return part._replace(setting=setting, max_new_tokens=min(longest, limits.tokens))


def text_of(tokenizer: Tokenizer, part: Part, tokens: Sequence[int]) -> str:
    """Return what is scored of an answer."""
    return part.response_prefix + cut(tokenizer.decode(tokens), part.stop, part.stop_included)


def grouping(reward_group: str, requests: Sequence[Request]) -> Callable[[Request], Group]:
    """Return which answers a reward that compares sees together: see the option `reward_group`."""
    names: dict[str, Callable[[Request], Hashable]] = {
        "pair": lambda request: (request.member // 2, request.problem),
        "problem": lambda request: request.problem,
        "step": lambda request: 0,
    }
    name = names[reward_group]
    sizes = Counter(map(name, requests))
    return lambda request: Group(name(request), sizes[name(request)])
