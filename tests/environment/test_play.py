"""Environments of all forms, one episode at a time."""

import numpy as np
import pytest

from rwkv_es.environment.play import Game
from rwkv_es.task import Done, Problem, Reply

PROBLEM = Problem("2+3=", "5", {"sum": 5})


class Counting:
    """An object with state that ends at the third answer."""

    def __init__(self, problem):
        self.problem, self.num_heard, self.is_closed = problem, 0, False

    def reply(self, text):
        self.num_heard += 1
        if self.num_heard == 3:
            return Done(0.5, "bye")
        return Reply(f"{text}!", 0.25) if self.num_heard == 2 else f"{text}{self.problem.meta['sum']}"

    def close(self):
        Counting.closed = self.num_heard


class Awaited(Counting):
    async def reply(self, text):
        return super().reply(text)


async def made_later(problem):
    return Counting(problem)


def generator(problem):
    text = yield
    text = yield f"{text}{problem.meta['sum']}"
    yield Reply(f"{text}!", 0.25)
    return Done(0.5, "bye")


def generator_that_yields_its_end(problem):
    text = yield ""
    text = yield f"{text}{problem.meta['sum']}"
    yield Reply(f"{text}!", np.float32(0.25))
    yield Done(np.float64(0.5), "bye")


@pytest.mark.parametrize("environment", [Counting, Awaited, made_later, generator, generator_that_yields_its_end])
def test_every_form_says_the_same(environment):
    game = Game(environment, PROBLEM, 100)
    said = [game.answer(text) for text in ("a", "ü", "c")]
    assert [(s.text, s.reward, s.is_over, s.error) for s in said] == [
        ("a5", 0.0, False, ""),
        ("ü!", 0.25, False, ""),
        ("bye", 0.5, True, ""),
    ]


def always(value):
    class Always:
        def reply(self, text):
            return value

    return lambda problem: Always()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (always(7), "got int"),
        (always(None), "got NoneType"),
        (always(b"x"), "got bytes"),
        (always(("a", 1)), "got tuple"),
        (always(Done("1")), "must be a number"),
        (always(Done(float("nan"))), "must be finite"),
        (always(Reply(3, 1)), "got int"),
        (always(Reply("x", float("inf"))), "must be finite"),
        (lambda problem: 5, "an object with reply"),
        (lambda problem: None, "an object with reply"),
        (lambda problem: (_ for _ in ["hello"]), "first yield"),
        (lambda problem: (_ for _ in [None]), "return Done"),
        (lambda problem: (_ for _ in []), "StopIteration"),
        (lambda problem: problem.nothing, "nothing"),
        (lambda problem: {}["x"], "KeyError"),
    ],
)
def test_what_is_no_environment_ends_its_episode_and_says_why(environment, words):
    said = Game(environment, PROBLEM, 100).answer("x")
    assert said.is_over and said.reward == 0.0 and words in said.cause and not said.is_timeout


def leaves(text):
    raise SystemExit(3)


def test_an_environment_that_leaves_ends_its_episode_alone():
    class Leaving:
        def reply(self, text):
            raise SystemExit(3)

    assert "SystemExit" in Game(lambda problem: Leaving(), PROBLEM, 100).answer("x").cause


def test_done_at_once_and_done_without_a_reward():
    assert Game(always(Done(1)), PROBLEM, 100).answer("x")[:3] == ("", 1.0, True)
    assert Game(always(Done(None)), PROBLEM, 100).answer("x")[:3] == ("", None, True)


def test_a_huge_reply_is_not_carried_on():
    said = Game(always("x" * 1_000_000), PROBLEM, 100).answer("x")
    assert len(said.text) == 101 and not said.is_over


def test_an_environment_is_closed_once():
    game = Game(Counting, PROBLEM, 100)
    game.answer("a")
    game.close()
    assert Counting.closed == 1
    Game(always(""), PROBLEM, 100).close()  # it was never made


def test_a_failure_is_told_in_the_users_own_frames():
    def broken(problem):
        raise ValueError("no such level")

    said = Game(broken, PROBLEM, 9).answer("x")
    assert (
        said.error.splitlines()[0].startswith(f'File "{__file__}", line ') and "rwkv_es/environment" not in said.error
    )
    assert said.error.endswith("ValueError: no such level") and said.cause.startswith("ValueError: no such level (")
    wrong = Game(lambda problem: Counting, PROBLEM, 9).answer("x")
    assert wrong.is_over and "\n" not in wrong.error and wrong.error.startswith("TypeError: ")
