"""What a verb works with: model, tokenizer, task and scorers; problems go in, scored answers come out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_es.config.options import Config
from rwkv_es.engine.capacity import slots_of
from rwkv_es.engine.decoding import GenerationConfig
from rwkv_es.engine.engines import examined
from rwkv_es.engine.references import Reading, Reference, read_references
from rwkv_es.engine.rollout import Completion, Rollout, rollout
from rwkv_es.engine.scheduler import Request, with_shared_prefixes
from rwkv_es.environment.episodes import NO_EPISODES, Episode, Episodes, Turn, begun, with_episodes
from rwkv_es.environment.parts import Part, grouping, part_of_task, text_of
from rwkv_es.environment.pool import Environments, environments_of
from rwkv_es.model.batch import Verdict, say_advice
from rwkv_es.model.forward import Model
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.model.weights import BASE, Factors, Members
from rwkv_es.pretrained.checkpoint import Params
from rwkv_es.pretrained.load import load_base
from rwkv_es.pretrained.tokenizer import END_ID, Tokenizer, load_tokenizer
from rwkv_es.reward.adapters import Answer, Scorer
from rwkv_es.reward.pool import RewardPool, bounds_of
from rwkv_es.reward.sheet import Scores
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.streams import waiting
from rwkv_es.system.texts import without_surrogates
from rwkv_es.task.mixture import load_tasks
from rwkv_es.task.prompts import Prompting, prompt_of, reference_of, template_of
from rwkv_es.task.task import PART, Problem, Task


class Session(NamedTuple):
    """Everything that stays the same during a run."""

    base_path: Path
    base: Params  # memory-mapped, as in the file
    model: Model  # a copy of the base in the engine's dtype, to be changed in place
    tokenizer: Tokenizer
    task: Task
    template: str  # of a mixture, as decoding.stops: of its first part
    decoding: GenerationConfig
    parts: tuple[Part, ...]
    prompting: Prompting
    has_bos: bool = False
    reward_group: str = "pair"
    environments: Environments | None = None


class Answers(NamedTuple):
    """Answers in the order member, problem, sample."""

    problems: list[Problem]  # the problem of each answer
    texts: list[str]  # what the scorer reads
    rollout: Rollout
    episodes: Mapping[int, Episode] = NO_EPISODES  # of tasks with an environment, by their places

    @property
    def broken(self) -> list[int]:
        """The places of answers that ended because the logits were not finite: they have no reward."""
        return [place for place, found in enumerate(self.rollout.completions) if found.finish == "broken"]

    def turns_of(self, place: int) -> Sequence[Turn]:
        """Return the turns of an episode; none of an answer that is no episode."""
        return self.episodes[place].turns if place in self.episodes else ()

    @property
    def token_ids(self) -> list[list[int]]:
        """The tokens of each answer, without its response_prefix."""
        return [completion.tokens for completion in self.rollout.completions]


def open_session(config: Config, task: Task | None = None) -> Session:
    """Load what the options name, but for a task that is given.

    Raises:
        ConfigError, CheckpointError, TaskError: something cannot be loaded or does not fit.
    """
    path, base, model = open_model(config)
    task = load_tasks(config.task, config.data, config.eval_sets) if task is None else task
    tokenizer = load_tokenizer(config.tokenizer, path, model.arch.n_vocab)
    prompting = Prompting(config.template, config.system, config.shots)
    parts = tuple(part_of_task(part, tokenizer, prompting, config) for part in task.parts or (task,))
    sampling = SamplingParams.of(config, config.seed)
    return Session(
        path,
        base,
        model,
        tokenizer,
        task,
        template_of(task, prompting),
        GenerationConfig(
            parts[0].stops,
            sampling,
            slots_of(config, model, has_turns=task.environment is not None),
            config.engine,
            config.threads or torch.get_num_threads(),
        ),
        parts,
        prompting,
        config.bos,
        config.reward_group,
    )


def open_model(config: Config) -> tuple[Path, Params, Model]:
    """Load the base checkpoint. Returns its path, the tensors as in the file, and a copy for the engine.

    Raises:
        ConfigError, CheckpointError: it cannot be loaded, or the device cannot be used.
    """
    with waiting(f"loading {config.model}"):
        path, base, model = load_base(
            config.model, dtype=config.dtype, device=config.device, quantize=config.quantize, state=config.state
        )
    return path, base, model._replace(state_dtype=torch.float16 if config.state_dtype == "fp16" else torch.float32)


@contextmanager
def open_scorers(config: Config, scorer: Scorer | None = None) -> Iterator[RewardPool]:
    """Start the worker processes that score answers, unless a scorer is given."""
    with RewardPool(
        config.task,
        config.data,
        config.reward_workers,
        config.reward_timeout,
        config.reward_error_limit,
        reward=config.reward,
        signature=config.reward_signature,
        sets=config.eval_sets,
        bounds=bounds_of(config),
        scorer=scorer,
    ) as scorers:
        yield scorers


@contextmanager
def open_environments(config: Config, session: Session, task: Task | None = None) -> Iterator[Session]:
    """Return the session with the processes of its task's environments; those of a `task` that is given run here."""
    if session.task.environment is None:
        yield session
        return
    limits = [part.setting.limits for part in session.parts if part.setting is not None]
    is_here = task is not None or not config.reward_workers
    environments = environments_of(config, session.task, limits, is_here=is_here)
    try:
        yield session._replace(environments=environments)
    finally:
        environments.close()


def steady(session: Session, verdict: Verdict) -> Session:
    """Return the session with products of as many rows as the verdict says."""
    return session._replace(decoding=session.decoding._replace(row_multiple=verdict.multiple))


def examined_alone(session: Session, factors: Factors | None = None) -> Session:
    """Return the session `steady` on this machine; say what it cannot promise. For commands of one process."""
    verdict = examined(session.model, session.decoding, factors)
    say_advice(verdict)
    return steady(session, verdict)


def answer(
    session: Session,
    problems: Sequence[Problem],
    members: Members = BASE,
    samples: int = 1,
    scorers: RewardPool | None = None,
    *,
    first: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Let every member answer every problem `samples` times; hand each answer to `scorers` as soon as it has ended.

    `first` is the number of the first problem: of several processes that share problems, each has a stretch of them,
    and what is sampled is a function of the number. `advance` is told how many answers have ended since the last time.

    A reward that compares sees a mirrored pair's answers to a problem together: pairs are never split among processes.
    """
    prompts = [encode_prompt(session, problem) for problem in problems]
    parts = [part_of(session, problem) for problem in problems]
    requests = [
        Request(member, number, prompt, part.max_new_tokens, sample, members.step, stops=part.stops)
        for member in members.ids
        for number, (prompt, part) in enumerate(zip(prompts, parts), first)
        for sample in range(samples)
    ]
    asked = [(problems[request.problem - first], parts[request.problem - first]) for request in requests]
    answered = [problem for problem, _ in asked]
    group_of = grouping(session.reward_group, requests)
    texts = [""] * len(requests)

    settings = [part.setting if session.environments else None for _, part in asked]
    episodes = Episodes(session.environments, session.tokenizer, begun(requests, answered, settings))

    def on_finished(ended: Mapping[int, Completion]) -> None:
        for place, completion in ended.items():
            if place in episodes.by_place:
                continue
            texts[place] = text_of(session.tokenizer, asked[place][1], completion.tokens)
            if scorers is not None and completion.finish != "broken":
                group = group_of(requests[place])
                scorers.submit(place, Answer(answered[place], texts[place], completion.tokens, members.step), group)
        if ended:
            advance(len(ended))
        if scorers is not None:
            scorers.poll()

    shared = with_shared_prefixes(requests)
    generate = partial(rollout, partner=episodes) if episodes.by_place else rollout
    found = generate(session.model, shared, session.decoding, members.factors, on_finished)
    for place, episode in episodes.gather().items():
        texts[place] = episode.text
    return Answers(answered, texts, found, episodes.by_place)


def collect(answers: Answers, scorers: RewardPool) -> Scores:
    """Wait for the scores of answers that were handed to `scorers`; broken ones have none, episodes bring theirs.

    Raises:
        RewardError: see `RewardPool.gather`.
    """
    scores = scorers.gather()
    others = answers.episodes.keys() | set(answers.broken)
    places = [place for place in range(len(answers.texts)) if place not in others]
    rewards: dict[int, float | None] = dict(zip(places, scores.rewards))
    found = scores._replace(
        rewards=[rewards.get(place) for place in range(len(answers.texts))],
        causes={places[at]: cause for at, cause in scores.causes.items()},
    )
    return with_episodes(found, answers.episodes, scorers.error_limit)


def greedy(session: Session) -> Session:
    """Return the session with greedy decoding."""
    decoding = session.decoding
    return session._replace(decoding=decoding._replace(sampling=decoding.sampling._replace(temperature=0.0)))


def encode_prompt(session: Session, problem: Problem) -> tuple[int, ...]:
    """Render and tokenise a question.

    Raises:
        ConfigError: nothing is left to read.
    """
    prompt = tuple(session.tokenizer.encode(prompt_of(session.task, problem, session.prompting)))
    if not prompt:
        hint = ", or let the answers be read: --objective logprob" if problem.answer else ""
        raise ConfigError(f"the prompt is empty after the template {session.template!r}; ask something{hint}")
    return (END_ID, *prompt) if session.has_bos else prompt


def read(
    session: Session,
    problems: Sequence[Problem],
    members: Members = BASE,
    advance: Callable[[int], None] = lambda count: None,
) -> Reading:
    """Let every member read every problem with its reference answer.

    Raises:
        ConfigError: see `reference`.
    """
    references = [reference(session, problem) for problem in problems]
    return read_references(session.model, references, session.decoding, members, advance)


def reference(session: Session, problem: Problem) -> Reference:
    """Encode a problem's prompt with its reference answer.

    Token 0 ends an answer that no stop string does. A text without a question follows token 0 and is left open, since
    it is a part of a longer one.

    Raises:
        ConfigError: it has no answer, or the vocabulary cannot express it.
    """
    if not problem.answer:
        raise ConfigError(
            "objective logprob reads the reference answer of every problem, and one has none: "
            f"{problem.prompt[:60]!r}; give the data a column answer, or train on rewards (--objective mean)"
        )
    prompt = session.tokenizer.encode(prompt_of(session.task, problem, session.prompting))
    answer, is_ended = reference_of(session.task, problem, session.prompting)
    ids = [*session.tokenizer.encode(answer), *([END_ID] if prompt and not is_ended else [])]
    before = [END_ID, *prompt] if session.has_bos or not prompt else prompt
    return Reference((*before, *ids), len(before), len(without_surrogates(answer).encode()))


def part_of(session: Session, problem: Problem) -> Part:
    """Return how a problem is asked."""
    return session.parts[problem.meta.get(PART, 0)]
