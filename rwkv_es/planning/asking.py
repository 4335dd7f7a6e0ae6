"""What a run asks of its model: answers or episodes of a task, and reference answers to read."""

from typing import NamedTuple

from rwkv_es.config.objective import objective_of
from rwkv_es.config.options import Config
from rwkv_es.planning.speed import Workload
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.task import Task
from rwkv_es.task.turns import given_limits, limited


class Asked(NamedTuple):
    """What is generated and what is read in a step or in an evaluation; None: nothing is."""

    sampled: Workload | None
    told: Workload | None  # reference answers, taken as long as an answer may be
    has_turns: bool  # episodes wait for what environments say

    @property
    def first(self) -> Workload:
        """What most of the time goes into."""
        found = self.sampled or self.told
        assert found is not None, "an objective pays for one of both"
        return found

    @property
    def parts(self) -> list[Workload]:
        """All that there is."""
        return [part for part in (self.sampled, self.told) if part is not None]


def asked_of(config: Config, task: Task | None = None) -> Asked:
    """Return what a step asks; a task that is no built-in one may be a Python object.

    Raises:
        TaskError: the task cannot be loaded.
    """
    task = load_tasks(config.task, config.data, config.eval_sets) if task is None else task
    objective, parts = objective_of(config.objective), task.parts or (task,)
    answer, whole = max(_answer(config, part) for part in parts), max(_whole(config, part) for part in parts)
    rows, prompt = config.prompts * config.samples, config.prompt_tokens
    sampled = Workload(config.population * rows, prompt, whole, rows)
    told = Workload(config.population * config.prompts, prompt, answer, config.prompts)
    has_turns = any(part.environment is not None for part in parts)
    is_told, is_sampled = objective.logprob > 0, objective.outcome > 0
    return Asked(sampled if is_sampled else None, told if is_told else None, has_turns and is_sampled)


def held_out_of(config: Config, asked: Asked) -> Asked:
    """Return what an evaluation asks, of each set and of a model without noise."""
    objective, each = objective_of(config.objective), config.eval_size * (1 + config.eval_sets.count(","))

    def of(count: int) -> Workload:
        return asked.first._replace(answers=count, rows_per_member=max(count, 1))

    sampled = of(each * (1 + config.eval_samples)) if objective.samples else None
    return Asked(sampled, of(each) if objective.logprob else None, asked.has_turns)


def _answer(config: Config, task: Task) -> int:
    return config.max_new_tokens or task.max_new_tokens


def _whole(config: Config, task: Task) -> int:
    """Return the most tokens after a prompt: an answer's, or an episode's answers and replies."""
    if task.environment is None:
        return _answer(config, task)
    return limited(task.limits, _answer(config, task), given_limits(config)).tokens
