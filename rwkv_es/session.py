"""What a verb works with: model, tokenizer, task and scorers; problems go in, scored answers come out."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_es.checkpoint import Params, load, resolve
from rwkv_es.config import Config
from rwkv_es.errors import ConfigError
from rwkv_es.model import Factors, Model, rows_differ
from rwkv_es.pool import Request, with_forks
from rwkv_es.reward import RewardPool
from rwkv_es.rollout import Decoding, Rollout, padded, rollout
from rwkv_es.sampler import Sampling
from rwkv_es.task import Problem, Task, load_task, opening, render
from rwkv_es.tokenizer import Tokenizer, cut, load_tokenizer, make_stops


class Session(NamedTuple):
    """Everything that stays the same during a run."""

    base_path: Path
    base: Params  # memory-mapped, as in the file
    model: Model  # a copy of the base in the engine's dtype, to be changed in place
    tokenizer: Tokenizer
    task: Task
    template: str
    max_new: int
    decoding: Decoding


class Answers(NamedTuple):
    """Answers in the order member, problem, sample."""

    problems: list[Problem]  # the problem of each answer
    texts: list[str]  # what the scorer reads
    rollout: Rollout


def open_session(config: Config) -> Session:
    """Load what the options name.

    Raises:
        ConfigError, CheckpointError, TaskError: something cannot be loaded or does not fit.
    """
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = _device(config.device)
    path = resolve(config.model)
    base, arch = load(path)
    task = load_task(config.task, config.data)
    tokenizer = load_tokenizer(config.tokenizer, path, arch.n_vocab)
    dtype = _dtype(config.dtype, base["emb.weight"].dtype, device)
    params = {name: tensor.to(device, dtype, copy=True) for name, tensor in base.items()}
    sampling = Sampling(config.seed, config.temperature, config.top_p, config.top_k)
    return Session(
        path,
        base,
        Model(params, arch),
        tokenizer,
        task,
        task.template if config.template == "auto" else config.template,
        config.max_new or task.max_new,
        Decoding(make_stops(tokenizer, task.stop), sampling, config.slots, config.engine, torch.get_num_threads()),
    )


@contextmanager
def open_scorers(config: Config) -> Iterator[RewardPool]:
    """Start the worker processes that score answers."""
    with RewardPool(
        config.task, config.data, config.reward_workers, config.reward_timeout, config.reward_error_limit
    ) as scorers:
        yield scorers


def warn_if_rows_differ(session: Session) -> None:
    """Say on stderr where the linear algebra library makes a completion depend on how many others are in flight."""
    differing = rows_differ(session.model, padded(session.decoding.slots))
    if differing:
        print(
            f"rwkv-es: a row of {differing[0]} has other last bits among {session.decoding.slots} slots than "
            "among 8 on this machine; results repeat exactly only with the same --slots",
            file=sys.stderr,
        )


class Asked(NamedTuple):
    """Who is asked, how often, under which noise."""

    members: Sequence[int]
    samples: int = 1
    step: int = 0
    factors: Factors | None = None


AS_IT_IS = Asked((-1,))  # the unperturbed model, once


def answer(session: Session, problems: Sequence[Problem], asked: Asked = AS_IT_IS) -> Answers:
    """Let every member answer every problem `samples` times."""
    prompts = [encode_prompt(session, problem.prompt) for problem in problems]
    requests = with_forks(
        [
            Request(member, index, prompt, session.max_new, sample, asked.step)
            for member in asked.members
            for index, prompt in enumerate(prompts)
            for sample in range(asked.samples)
        ]
    )
    result = rollout(session.model, requests, session.decoding, asked.factors)
    texts = [_text(session, completion.tokens) for completion in result.completions]
    return Answers([problems[request.problem] for request in requests], texts, result)


def greedy(session: Session) -> Session:
    """Return the session with greedy decoding."""
    decoding = session.decoding
    return session._replace(decoding=decoding._replace(sampling=decoding.sampling._replace(temperature=0.0)))


def encode_prompt(session: Session, question: str) -> tuple[int, ...]:
    """Render and tokenise a question.

    Raises:
        ConfigError: nothing is left to read.
    """
    prompt = tuple(session.tokenizer.encode(render(session.template, question)))
    if not prompt:
        raise ConfigError(f"the prompt is empty after the template {session.template!r}; ask something")
    return prompt


def _text(session: Session, tokens: Sequence[int]) -> str:
    return opening(session.template) + cut(session.tokenizer.decode(tokens), session.task.stop)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None


def _dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the engine's dtype: on a CPU fp32 unless bf16 is asked for; elsewhere the file's own."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    return torch.float32 if device.type == "cpu" or stored == torch.float16 else stored
