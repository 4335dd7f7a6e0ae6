"""Options that do nothing beside others: a user who gives one expects what will not happen."""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from rwkv_es.config.objective import objective_of
from rwkv_es.config.option import default_of
from rwkv_es.config.options import FIELDS, OPTIONS, Config


class Idle(NamedTuple):
    """An option that does nothing."""

    name: str
    text: str
    is_harmless: bool  # nothing is lost with it, so it is said and not refused


class _Rule(NamedTuple):
    names: str  # options, with blanks between
    is_idle: Callable[[Config], bool]
    why: str
    verbs: str = ""  # "": all that have the option
    is_harmless: bool = False


def _is_greedy(config: Config) -> bool:
    return config.temperature == 0 or config.top_k == 1


def _is_decaying(config: Config) -> bool:
    return config.schedule != "constant" and config.schedule_end < 1


def _samples_nothing(config: Config) -> bool:
    return not objective_of(config.objective).samples


def _reads_nothing(config: Config) -> bool:
    return not objective_of(config.objective).logprob


def _has_own_reward(config: Config) -> bool:
    """Say whether one of the rewards is a function of the user's, which may be called in several ways."""
    return any(not part.strip().startswith("builtin:") for part in config.reward.split(",") if part.strip())


def _has_own_set(config: Config) -> bool:
    """Say whether one of the evaluation sets is of the task itself, so that its reward scores it."""
    tasks = {(part.rpartition("=")[0] or part).strip() for part in config.task.split(",")}
    return any(part.partition("=")[0].strip() in tasks for part in config.eval_sets.split(","))


_OF_WORKERS = "reward_timeout reward_import_timeout reward_memory reward_cuda"
_OF_TASK = "task objective data template system shots bos samples split eval_size eval_sets reward reward_signature"
_OF_TASK += " reward_workers reward_group reward_error_limit temperature top_p top_k min_p max_new_tokens seed out"
_OF_TASK += f" presence_penalty frequency_penalty penalty_decay {_OF_WORKERS}"
_OF_SAMPLING = "samples eval_samples temperature top_p top_k min_p presence_penalty frequency_penalty penalty_decay"
_OF_SAMPLING += f" max_new_tokens reward reward_signature reward_error_limit {_OF_WORKERS}"
_RULES = (
    _Rule(_OF_SAMPLING, _samples_nothing, "with objective logprob alone, which reads answers and samples none"),
    _Rule("out", _samples_nothing, "with objective logprob alone, which has no answers to write", "eval"),
    _Rule("objective", _reads_nothing, "in eval, unless it reads reference answers: --objective logprob", "eval"),
    _Rule(_OF_TASK, lambda c: bool(c.text), "with --text, which is read instead of asking a task; leave it out"),
    _Rule("samples eval_samples", _is_greedy, "if all answers are greedy, so all the same; try --temperature 1"),
    _Rule("top_p top_k min_p", lambda c: not c.temperature, "at temperature 0, which is greedy; try --temperature 1"),
    _Rule("temperature top_p min_p", lambda c: c.top_k == 1, "with top_k 1, which always takes the likeliest token"),
    _Rule("penalty_decay", lambda c: not c.frequency_penalty, "without a frequency_penalty"),
    _Rule("seed", _is_greedy, "if all answers are greedy; try --temperature 1", "eval generate chat", True),
    _Rule("momentum", lambda c: c.optimizer == "sgd", "with optimizer sgd; try --optimizer momentum, or adam"),
    _Rule("sigma_decay", lambda c: not _is_decaying(c), "where the schedule decays nothing; try --schedule linear"),
    _Rule("schedule_end", lambda c: c.schedule == "constant", "with schedule constant; try --schedule linear"),
    _Rule("schedule", lambda c: c.schedule_end == 1, "with schedule_end 1, which is where it begins; lower that"),
    _Rule("master", lambda c: c.dtype == "fp32", "with dtype fp32, since it is about bf16 weights"),
    _Rule("rank", lambda c: set(c.targets) == {"vectors"}, "where only vectors are targets: their noise is full"),
    _Rule("patience", lambda c: not c.eval_every, "without held-out evaluations; try --eval-every 10"),
    _Rule(
        "patience",
        lambda c: c.patience * c.eval_every >= c.steps > 0,
        "before the last step: there are not so many evaluations; lower it, or --eval-every",
        "train",
        True,
    ),
    _Rule("eval_size", lambda c: not c.eval_every, "without held-out evaluations", "train", True),
    _Rule("eval_sets eval_samples", lambda c: not c.eval_every, "without held-out evaluations", "train"),
    _Rule(
        "reward reward_signature reward_group",
        lambda c: bool(c.eval_sets) and not _has_own_set(c),
        "with eval_sets of other tasks than --task: each is scored by its own",
        "eval",
    ),
    _Rule("split", lambda c: bool(c.eval_sets), "with eval_sets, whose held-out problems are asked", "eval"),
    _Rule("reward_signature", lambda c: not _has_own_reward(c), "without a reward of yours; name one by --reward"),
    _Rule("reward_group", lambda c: not _has_own_reward(c), "without a reward of yours; name one by --reward"),
    _Rule(_OF_WORKERS, lambda c: not c.reward_workers, "without reward workers; try --reward-workers 1"),
    _Rule("base", lambda c: c.base == c.model, "if it is the model itself: nothing differs", "eval", True),
)
_NAMED_IS_MEANT = ("momentum", "schedule_end")  # whoever names them means them, also at their default


def idle_options(config: Config, verb: str, given: Collection[str] = ()) -> Iterator[Idle]:
    """Yield what does nothing of the options that differ from their default or, being `given`, are meant."""
    found: set[str] = set()
    for rule in _RULES:
        if rule.verbs and verb not in rule.verbs.split():
            continue
        for name in rule.names.split():
            is_meant = getattr(config, name) != default_of(FIELDS[name]) or (name in given and name in _NAMED_IS_MEANT)
            if name in OPTIONS[verb] and name not in found and is_meant and rule.is_idle(config):
                found.add(name)
                value = getattr(config, name)
                yield Idle(
                    name, f"{name} {value if value != '' else repr(value)} does nothing {rule.why}", rule.is_harmless
                )


def idle_here(config: Config, num_processes: int, dtype: str) -> Iterator[Idle]:
    """Yield what does nothing in a training by so many processes, with weights of a dtype, in torch's words."""
    for name in ("rank_timeout", "checksum_every"):
        if num_processes == 1 and getattr(config, name) != default_of(FIELDS[name]):
            yield Idle(name, f"{name} does nothing if one process trains alone", True)
    if config.master != "fp32" and dtype != "bfloat16":
        yield Idle(
            "master", f"master {config.master} does nothing if the weights are {dtype}: it is about bfloat16", True
        )
