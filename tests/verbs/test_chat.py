"""A conversation: what is shown, what the state has read, and what no input can break."""

import io
import os
import signal
import subprocess
import sys

import pytest
import reference
import torch
from models import make_model

from rwkv_es.config.options import Config
from rwkv_es.model.forward import forward, new_state
from rwkv_es.model.sampler import SamplingParams
from rwkv_es.model.weights import Weights
from rwkv_es.system.errors import ConfigError
from rwkv_es.verbs import chat as module
from rwkv_es.verbs.chat import Conversation, Speaker, find_stop, interruptible, num_held
from rwkv_es.verbs.evaluate import generate

WORDS = [b".\n\n", b"User:", b"\n\nUser", b"\xe4\xbd", b"\xa0"]
STOPS = (b"\n\nUser:", b"#")


class ByteTokenizer:
    """Token 1 + b is the byte b; then some longer words, which `encode` never uses."""

    end_id = 0
    token_bytes = (b"", *(bytes([b]) for b in range(256)), *WORDS)
    n_vocab = len(token_bytes)

    def encode(self, text):
        if "?!" in text:
            raise ConfigError("cannot express this")
        return [1 + b for b in text.encode()]

    def decode(self, ids):
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("model"), n_layer=2, n_embd=64, n_vocab=264)
    return Speaker(model, ByteTokenizer(), max_new_tokens=12)


def ids_of(*parts):
    """Return the tokens of words of the vocabulary, and of other text byte by byte."""
    return [i for p in parts for i in ([257 + WORDS.index(p)] if p in WORDS else ByteTokenizer().encode(p.decode()))]


def scripted(speaker, script):
    """Return a conversation that says what the script says, then ends."""
    conversation = Conversation(speaker)
    said = iter(script)
    conversation._sample = lambda x, position: next(said, 0)
    return conversation


def state_after(speaker, ids):
    state, weights = new_state(speaker.model, 1), Weights(speaker.model.params)
    for token in ids:
        forward(weights, speaker.model.arch, torch.tensor([token]), state)
    return state


def assert_has_read(conversation, ids):
    for found, wanted in zip(conversation.state, state_after(conversation.speaker, ids)):
        # Not the same bits: a text is read in parts, and products of several rows take other paths than those of one.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


FIRST = b"User: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("answer", "shown", "has_read", "rest"),
    [
        ((b" ok",), " ok", (b" ok",), ""),
        ((b" ok\n\nUser: no",), " ok", (b" ok",), ""),  # the stop string over seven tokens
        ((b" ok", b"\n\nUser", b":x"), " ok", (b" ok",), ""),
        ((b" ok", b".\n\n", b"User:", b"x"), " ok.", (b" ok",), "."),  # it begins inside a token
        ((b" a\n", b".\n\n", b"User:"), " a\n.", (b" a\n",), "."),
        ((b" a\n\nUs b",), " a\n\nUs b", (b" a\n\nUs b",), ""),  # no stop string after all
        ((b"\n\n", b"\n\nUser", b":"), "\n\n", (b"\n\n",), ""),
        ((b"\n", b"\n\nUser", b":"), "\n", (b"\n",), ""),
        ((), "", (), ""),
    ],
)
def test_an_answer_ends_before_the_stop_string_and_so_does_the_state(speaker, answer, shown, has_read, rest):
    conversation = scripted(speaker, ids_of(*answer))
    pieces = list(conversation.reply("hi"))
    assert "".join(pieces) == shown
    assert_has_read(conversation, ids_of(FIRST, *has_read))
    assert (conversation.unread, conversation.rest) == ([], rest)


def test_the_next_turn_goes_on_from_there(speaker):
    conversation = scripted(speaker, ids_of(b" ok", b".\n\n", b"User:"))
    list(conversation.reply("hi"))
    conversation._sample = lambda x, position: 0
    list(conversation.reply("and"))
    assert_has_read(conversation, ids_of(FIRST, b" ok", b".\n\nUser: and\n\nAssistant:"))


def test_a_longest_answer_is_read_whole_by_the_next_turn(speaker):
    conversation = scripted(speaker._replace(max_new_tokens=3), ids_of(b"abcdef"))
    assert "".join(conversation.reply("hi")) == "abc"
    assert_has_read(conversation, ids_of(FIRST, b"ab"))
    assert conversation.unread == ids_of(b"c")
    list(conversation.reply("and"))
    assert_has_read(conversation, ids_of(FIRST, b"abc\n\nUser: and\n\nAssistant:", b"de"))


@pytest.mark.parametrize("after", [0, 5, len(FIRST), len(FIRST) + 2])
def test_an_answer_cut_short_leaves_a_state_to_go_on_from(speaker, after, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 1)
    conversation = scripted(speaker, ids_of(b"abcdefgh"))
    asked = []

    def is_stopped():
        asked.append(1)
        return len(asked) > after

    said = "".join(conversation.reply("hi", is_stopped))
    assert said == "abcdefgh"[: max(0, after - len(FIRST)) + 1] * (after >= len(FIRST))
    conversation._sample = lambda x, position: 0
    list(conversation.reply("and"))
    assert_has_read(conversation, ids_of(FIRST, said.encode(), b"\n\nUser: and\n\nAssistant:"))


def test_bytes_that_are_no_text_become_another_character_and_split_ones_come_whole(speaker):
    conversation = scripted(speaker, [1 + 0xFF, *ids_of(b"\xe4\xbd", b"\xa0", b"a", b"\xe4\xbd")])
    pieces = [piece for piece in conversation.reply("hi") if piece]
    assert pieces == ["�", "你", "a", "�"]


def test_terminal_commands_are_not_passed_on(speaker, capsys):
    module._answer(scripted(speaker, ids_of(b"\x1b[2J\x07a\tb\n")), "hi")
    assert capsys.readouterr().out == "�[2J�a\tb\n\n"


def test_a_question_outside_the_vocabulary_changes_nothing(speaker, capsys):
    conversation = scripted(speaker, ids_of(b"a"))
    module._answer(conversation, "?!")
    assert "cannot express this" in capsys.readouterr().err
    assert conversation.num_turns == 0
    assert "".join(conversation.reply("hi")) == "a"
    assert_has_read(conversation, ids_of(FIRST, b"a"))


def test_reset_forgets_everything(speaker):
    conversation = scripted(speaker._replace(has_bos=True), ids_of(b"ab"))
    list(conversation.reply("hi"))
    conversation.reset()
    conversation._sample = lambda x, position: 0
    list(conversation.reply("hi"))
    assert_has_read(conversation, [0, *ids_of(FIRST)])


@pytest.mark.parametrize(
    ("template", "system", "first", "second"),
    [
        ("chat", "", b"User: a\n\nAssistant:", b"\n\nUser: b\n\nAssistant:"),
        ("system", "Be kind.", b"System: Be kind.\n\nUser: a\n\nAssistant:", b"\n\nUser: b\n\nAssistant:"),
        ("think", "", b"User: a\n\nAssistant: <think", b"\n\nUser: b\n\nAssistant: <think"),
        ("flower", "", "User✿a✿\nBot✿<think".encode(), "✿\nUser✿b✿\nBot✿<think".encode()),
        ("raw", "", b"a", b"b"),
    ],
)
def test_turns_of_the_templates(speaker, template, system, first, second):
    conversation = scripted(speaker._replace(template=template, system=system), [])
    opening = "".join(conversation.reply("a"))
    assert opening == {"think": " <think", "flower": "<think"}.get(template, "")
    list(conversation.reply("b"))
    assert_has_read(conversation, ids_of(first, second))


def test_greedy_answers_over_two_turns_are_the_likeliest_tokens(speaker):
    """Against float64 numpy over the whole conversation read as one text."""
    conversation = Conversation(speaker._replace(max_new_tokens=5))
    chosen, sample = [], conversation._sample
    conversation._sample = lambda x, position: chosen.append(sample(x, position)) or chosen[-1]
    list(conversation.reply("hi"))
    text, first = ids_of(FIRST), [token for token in chosen if token]
    assert len(first) == 5, "the answer must have its full length for this to mean anything"
    list(conversation.reply("and"))
    whole = [*text, *first, *ids_of(b"\n\nUser: and\n\nAssistant:"), *chosen[5:]]
    scores = reference.logits(speaker.model.params, whole)[:, : ByteTokenizer.n_vocab]
    second = len(whole) - len(chosen[5:])
    for place in (*range(len(text), len(text) + 5), *range(second, len(whole))):
        assert scores[place - 1][whole[place]] >= scores[place - 1].max() - 1e-4


@pytest.mark.parametrize(
    ("data", "held", "place"),
    [
        (b"", 0, None),
        (b"a\n", 1, None),
        (b"a\n\nUser", 6, None),
        (b"\n\n\n", 2, None),
        (b"a#b", 0, 1),
        (b"x\n\nUser:#", 0, 1),
    ],
)
def test_what_is_held_back(data, held, place):
    assert find_stop(data, STOPS) == place
    if place is None:
        assert num_held(data, STOPS) == held


def test_ctrl_c_asks_once_and_ends_the_second_time():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as is_stopped:
        assert not is_stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_lines_end_with_the_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a \n\n b"))
    assert list(module._lines()) == ["a", "", "b"]


def test_the_command_talks_through_pipes_and_survives_any_bytes(capsys):
    """The embedded model answers like `generate` does; a question in bytes that are no text is complained about."""
    question = "3 7 10=24:"
    (expected,) = generate(Config(prompt=question, engine="torch", threads=1, seed=0))
    sent = f"{question}\n/reset\n{question}\n\n".encode() + b"\xff\x00\xfe\n/exit\nnever read\n"
    command = [sys.executable, "-m", "rwkv_es", "chat", "tiny", "--template", "raw", "--threads", "1"]
    done = subprocess.run(
        command,
        input=sent,
        capture_output=True,
        check=False,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{expected}\n{expected}\n"
    assert b"cannot express" in done.stderr and b"never" not in done.stderr


def test_penalties_count_each_answer_by_itself(speaker):
    """Greedy answers follow the logits less presence + occurrence * frequency of this answer's own tokens."""
    speaker = speaker._replace(sampling=SamplingParams(presence_penalty=0.5, frequency_penalty=0.3, penalty_decay=0.9))
    conversation, chosen = Conversation(speaker), []
    choose = conversation._sample
    conversation._sample = lambda x, position: chosen.append((logits(x), choose(x, position))) or chosen[-1][1]

    def logits(x):
        return (x.double() @ speaker.model.params["head.weight"].double().T)[0, : ByteTokenizer.n_vocab]

    for question in ("hi", "more"):
        list(conversation.reply(question))
        counts = {}
        for scores, token in chosen:
            for other, count in counts.items():
                scores[other] -= 0.5 + 0.3 * count
            assert scores[token] >= scores.max() - 1e-4  # fp32 against fp64
            counts = {other: 0.9 * count for other, count in counts.items()}
            counts[token] = counts.get(token, 0) + (ByteTokenizer.token_bytes[token] not in b" \t0123456789")
        assert len(chosen) > 1
        chosen.clear()
