"""One episode's environment, whatever its form: answers in, texts and rewards out."""

import contextlib
import inspect
import os
import pickle
import time
from collections.abc import Callable
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from rwkv_es.reward.values import awaited, number
from rwkv_es.system.errors import cause, own_traceback
from rwkv_es.task.task import Problem
from rwkv_es.task.turns import Done, Reply

_MOST_CHARS_SHOWN = 100_000  # of a reply
Speak = Callable[[str], Any]  # the form that all environments are brought to


class Cut(Enum):
    """What is handed over in place of an answer if a limit has ended the episode."""

    CUT = 0


Answer = str | Cut


class Said(NamedTuple):
    """What became of an answer."""

    text: str = ""  # to be read, or last words
    reward: float | None = 0.0  # of this turn; None: the episode has no reward
    is_over: bool = False
    error: str = ""  # all that is known of a failure
    cause: str = ""  # the same in one line
    is_timeout: bool = False


def failed(error: str, said: str, *, is_timeout: bool = False) -> Said:
    """Return the end of an episode whose environment failed."""
    return Said("", 0.0, True, error, said, is_timeout)


class Game:
    """An environment under way."""

    def __init__(self, environment: Callable[[Problem], Any], problem: Problem, most_chars: int) -> None:
        self._environment, self._problem, self._most_chars = environment, problem, most_chars
        self._speak: Speak | None = None
        self._made: Any = None

    def answer(self, text: str) -> Said:
        """Hand an answer over; whatever goes wrong ends the episode."""
        try:
            if self._speak is None:
                self._made = awaited(self._environment(self._problem))
                self._speak = speaker(self._made)
            return self._checked(awaited(self._speak(text)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  SystemExit too: it is a user's code
            return _failure(error)

    def cut(self) -> Said:
        """End it by a limit; an environment with a method `cut` says what that earns besides."""
        pay = getattr(self._made, "cut", None)
        if not callable(pay):
            return Said(is_over=True)
        try:
            found = awaited(pay())
            return self._checked(found if isinstance(found, Done) else Done(found))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  as above
            return _failure(error)

    def close(self) -> None:
        """Let the environment tidy up, if it has something for that."""
        try:
            if callable(close := getattr(self._made, "close", None)):
                awaited(close())
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001  nobody waits for it any more
            pass

    def _checked(self, found: Any) -> Said:
        if isinstance(found, Done):
            return Said(_plain(str(found.text))[: self._most_chars], number(found.reward), True)
        text, reward = found if isinstance(found, Reply) else (found, 0.0)
        if not isinstance(text, str):
            raise TypeError(
                f"an environment must reply with a text, Reply(text, reward) or Done(reward); got {type(text).__name__}"
            )
        text = _plain(text)
        if len(text) > self._most_chars:  # a marker is enough: the model could never read it
            return Said(text[: self._most_chars + 1], number(reward) or 0.0)
        return Said(text, number(reward) or 0.0)


def played(environment: Callable[[Problem], Any], problem: Problem) -> list[tuple[str, Said]]:
    """Play the episode that a problem's `answer` writes down, an answer a line. Returns each with what was said."""
    game, found = Game(environment, problem, len(problem.answer) + _MOST_CHARS_SHOWN), []
    for line in problem.answer.split("\n"):
        found.append((line, game.answer(line)))
        if found[-1][1].is_over:
            break
    game.close()
    return found


def speaker(made: Any) -> Speak:
    """Return the function that takes an answer: an object's `reply`, or a generator's `send`.

    A generator runs up to its first `yield`, which hands over nothing: the problem's prompt is what is read first.

    Raises:
        TypeError: it is neither.
    """
    if inspect.isgenerator(made):
        return _of_generator(made)
    if callable(reply := getattr(made, "reply", None)):
        return reply
    raise TypeError(f"environment(problem) must return a generator, or an object with reply(text); got {made!r:.80}")


def _of_generator(made: Any) -> Speak:
    first = next(made)
    if first:
        raise TypeError(
            f"the first yield of an environment must hand over nothing, as in `text = yield`; got {first!r:.80}"
        )

    def speak(text: str) -> Any:
        try:
            return made.send(text)
        except StopIteration as end:
            if not isinstance(end.value, Done):
                raise TypeError(f"an environment must end with `return Done(reward)`; got {end.value!r:.80}") from None
            return end.value

    return speak


def play(host: Connection, environment: Callable[[Problem], Any], most_chars: int) -> None:
    """Play episodes, one answer after the other, until the host hangs up."""
    games: dict[int, Game] = {}
    process = os.getpid()
    with contextlib.suppress(EOFError, OSError):
        while True:
            for episode, problem, texts in pickle.loads(host.recv_bytes()):
                if problem is not None:
                    games[episode] = Game(environment, problem, most_chars)
                said, began = Said(is_over=True), time.monotonic()
                for text in texts:
                    said = _answered(games[episode], text)
                    if said.is_over:
                        break
                if os.getpid() != process:
                    os._exit(0)  # a process that the environment has forked came back as well: one of the two may speak
                if said.is_over and (game := games.pop(episode, None)) is not None:
                    game.close()
                if texts:
                    host.send_bytes(pickle.dumps((episode, tuple(said), time.monotonic() - began)))


def _answered(game: Game, text: Answer) -> Said:
    try:
        return game.cut() if isinstance(text, Cut) else game.answer(text)
    except KeyboardInterrupt as error:  # the environment's own: no key that is pressed gets here
        return failed(repr(error), "KeyboardInterrupt")


def _plain(text: str) -> str:
    """Return a string of a class of the user's, such as an enum's, as one that other processes know."""
    return str.__str__(text)


def _failure(error: BaseException) -> Said:
    said = cause(error)
    try:
        return failed(own_traceback(error), said)
    except MemoryError:  # again
        return failed(said, said)
