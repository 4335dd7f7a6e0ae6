"""`rwkv-es chat`: a conversation in the terminal; all that is kept of it is the model's state, of constant size."""

import codecs
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_es.config.options import Config
from rwkv_es.engine.likelihood import NOT_FINITE
from rwkv_es.model.forward import Model, State, forward, logits, new_state, reset_rows_, unperturbed
from rwkv_es.model.penalties import Penalties, penalties_of
from rwkv_es.model.sampler import SamplingParams, sample
from rwkv_es.pretrained.tokenizer import END_ID, Tokenizer, load_tokenizer
from rwkv_es.session import open_model
from rwkv_es.system.errors import ConfigError
from rwkv_es.system.texts import printable
from rwkv_es.task.templates import render, response_prefix, template_named

TOKENS_AT_ONCE = 64  # of a text that is read; between them Ctrl-C is heard
MAX_NEW_TOKENS = 2000  # tokens of an answer
TEMPLATE = "chat"
NEXT_USER = "\n\nUser:"  # the model goes on to write the next question itself
_GAPS = {"raw": "", "flower": "✿\n"}  # between an answer and the next turn; else an empty line


class Speaker(NamedTuple):
    """What stays the same in a conversation."""

    model: Model
    tokenizer: Tokenizer
    sampling: SamplingParams = SamplingParams()
    template: str = TEMPLATE
    system: str = ""
    max_new_tokens: int = MAX_NEW_TOKENS
    has_bos: bool = False

    @property
    def stops(self) -> tuple[bytes, ...]:
        """The bytes before which an answer ends."""
        return tuple(string.encode() for string in (NEXT_USER, *template_named(self.template).stop))


def chat(config: Config) -> None:
    """Talk with a checkpoint: a line on stdin is a question; `/reset` forgets, `/exit` ends, Ctrl-C cuts an answer.

    Raises:
        RwkvEsError: something cannot be loaded, or the system text does not fit the template.
    """
    conversation = Conversation(open_speaker(config))
    _accept_any_text()
    print("/reset forgets the conversation, /exit ends it, Ctrl-C cuts an answer short", file=sys.stderr)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line:
            _answer(conversation, line)


def open_speaker(config: Config) -> Speaker:
    """Load what the options name.

    Raises:
        RwkvEsError: something cannot be loaded, or the system text does not fit the template.
    """
    path, _, model = open_model(config)
    tokenizer = load_tokenizer(config.tokenizer, path, model.arch.n_vocab)
    sampling = SamplingParams.of(config, config.seed)
    template = TEMPLATE if config.template == "auto" else config.template
    render(template, "", config.system)  # says what does not fit
    return Speaker(
        model, tokenizer, sampling, template, config.system, config.max_new_tokens or MAX_NEW_TOKENS, config.bos
    )


class Conversation:
    """The conversation so far: the state after all tokens read, and the little that is not read yet."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self.state = new_state(speaker.model, 1)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        reset_rows_(self.state, unperturbed(self.speaker.model), torch.zeros(1, dtype=torch.int64))
        self.num_turns = 0
        self.unread: list[int] = [END_ID] if self.speaker.has_bos else []
        self.rest = ""  # text after `unread`
        self.penalties: Penalties | None = None  # on what the answer has written

    def reply(self, question: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer piece by piece; it ends when `is_stopped` says so, and the conversation can go on.

        Raises:
            ConfigError: the vocabulary cannot express the question, and nothing has changed then; or the logits are not
                finite.
        """
        ids = [*self.unread, *self.speaker.tokenizer.encode(self.rest + self._turn(question))]
        self.unread, self.rest, self.num_turns = ids, "", self.num_turns + 1
        x = None
        while self.unread and not is_stopped():
            x = self._read(self.unread[:TOKENS_AT_ONCE])
            self.unread = self.unread[TOKENS_AT_ONCE:]
        yield response_prefix(self.speaker.template)
        speaker = self.speaker
        device = speaker.model.like.device
        self.penalties = penalties_of(
            speaker.sampling, speaker.tokenizer.token_bytes, (1, speaker.max_new_tokens), device
        )
        if x is not None and not self.unread:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            for data in self._stream(x, is_stopped):
                yield decoder.decode(data)
            yield decoder.decode(b"", True)

    def _turn(self, question: str) -> str:
        template = self.speaker.template
        if not self.num_turns:
            return render(template, question, self.speaker.system)
        return _GAPS.get(template, "\n\n") + render("chat" if template == "system" else template, question)

    def _read(self, ids: list[int]) -> Tensor:
        """Read tokens; return the hidden x (1,C) after the last."""
        model = self.speaker.model
        tokens = torch.tensor(ids, device=model.like.device)
        return forward(unperturbed(model), model.arch, tokens, self.state)[-1:]

    def _sample(self, x: Tensor, position: int) -> int:
        speaker = self.speaker
        scores = logits(unperturbed(speaker.model), x)[:, : speaker.tokenizer.n_vocab]
        counter = torch.tensor([[position, self.num_turns, 0, 0]], device=scores.device)
        if not scores.isfinite().all():
            raise ConfigError(NOT_FINITE)
        row = torch.zeros(1, dtype=torch.int64, device=scores.device)
        if self.penalties is not None:
            self.penalties.penalise_(scores, row)
        token = sample(scores, speaker.sampling, counter)
        if self.penalties is not None:
            self.penalties.note_(row, token)
        return int(token)

    def _stream(self, x: Tensor, is_stopped: Callable[[], bool]) -> Iterator[bytes]:
        """Sample from the hidden x (1,C) on; yield bytes as soon as no stop string can begin in them.

        A stop string is unsaid: the state goes back to a token that ends before it, `rest` is what follows that.
        """
        stops, held = self.speaker.stops, b""
        mark, since = self.state, b""  # a state before the held bytes, and the bytes read since
        for position in range(self.speaker.max_new_tokens):
            token = self._sample(x, position)
            if token == END_ID:
                break
            data = self.speaker.tokenizer.token_bytes[token]
            num_before, held, since = len(held), held + data, since + data
            if (place := find_stop(held, stops)) is not None:
                yield held[:place]
                self._go_back(mark, since[: len(since) - len(held) + place])
                return
            num_shown = len(held) - num_held(held, stops)
            yield held[:num_shown]
            held = held[num_shown:]
            if num_shown >= num_before:  # nothing of earlier tokens is held any more
                mark, since = (State(*(part.clone() for part in self.state)), data) if held else (self.state, b"")
            if is_stopped() or position + 1 == self.speaker.max_new_tokens:
                self.unread = [token]
                break
            x = self._read([token])
        yield held

    def _go_back(self, mark: State, rest: bytes) -> None:
        for part, marked in zip(self.state, mark):
            part.copy_(marked)
        self.rest = rest.decode("utf-8", "replace")


def find_stop(data: bytes, stops: tuple[bytes, ...]) -> int | None:
    """Return where the first stop string begins; None if there is none."""
    return min((data.index(stop) for stop in stops if stop in data), default=None)


def num_held(data: bytes, stops: tuple[bytes, ...]) -> int:
    """Return the length of the longest end of `data` that a stop string may begin with."""
    lengths = (n for stop in stops for n in range(1, min(len(stop), len(data) + 1)) if data.endswith(stop[:n]))
    return max(lengths, default=0)


def _answer(conversation: Conversation, question: str) -> None:
    try:
        with interruptible() as is_stopped:
            for piece in conversation.reply(question, is_stopped):
                print(printable(piece), end="", flush=True)
        print(flush=True)
    except ConfigError as error:
        print(f"rwkv-es: {error}", file=sys.stderr)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C ask for an end (the function yielded reports whether it did) rather than end the program: no token is
    read by half. A second one ends the program."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)


def _accept_any_text() -> None:
    """Let bytes that are no text, and text that the terminal cannot show, become replacement characters."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
