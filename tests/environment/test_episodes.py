"""Episodes through the whole way from a session: limits, transcripts, what is read between two answers."""

import json

import pytest
import torch

from rwkv_es.config.options import build
from rwkv_es.environment.episodes import Episode, continuation
from rwkv_es.measure.console import readable
from rwkv_es.measure.metrics import count, lengths
from rwkv_es.pretrained.tokenizer import END_ID, WorldTokenizer
from rwkv_es.reward.adapters import Scorer
from rwkv_es.session import answer, collect, open_environments, open_scorers, open_session
from rwkv_es.system.errors import RewardError
from rwkv_es.task import Done, Problem, Reply
from rwkv_es.task.prompts import Prompting, turn_of
from rwkv_es.task.task import Task, load_task
from rwkv_es.task.turns import Limits, Setting

WORLD, FOUR = WorldTokenizer(), Limits(4, 60)


def read(written, reply, template, stop=(), is_ended=False):
    """What is read before the next answer, as texts: the last token of the last answer, and what follows."""
    task = Task("t", None, None, "1", stop, 8, template)
    setting = Setting("", stop, (), turn_of(task, Prompting()), Limits(9, 99))
    tokens = [*WORLD.encode(written), *([END_ID] if is_ended else [])]
    unread, rest, _ = continuation(WORLD, Episode(Problem("", ""), setting, None, last=tokens), reply)
    kept = WORLD.decode(tokens[:-1]) + WORLD.decode(unread)
    return kept, WORLD.decode(rest), (unread, rest)


NEXT = "\n\nUser: 7 + 1?\n\nAssistant:"


@pytest.mark.parametrize("template, prefix", [("chat", ""), ("think", " <think"), ("short_think", " <think>\n</think")])
def test_the_next_turn_is_as_the_template_writes_it_however_the_answer_ended(template, prefix):
    stop = ("\n\nUser:",)
    for written, is_ended in (("It is 8.\n\nUser:", False), ("It is 8.", True), ("It is 8.", False)):
        kept, rest, _ = read(written, "7 + 1?", template, stop, is_ended)
        assert kept + rest == "It is 8." + NEXT + prefix


def test_a_token_that_goes_over_the_end_of_a_stop_string_is_not_read():
    for tail in ("", "\n", "\n\n", "//"):
        kept, rest, _ = read(f"It is 8.\n\nUser:{tail}", "7 + 1?", "chat", ("\n\nUser:",))
        assert kept + rest == "It is 8." + NEXT, tail


def test_other_stop_strings_stay_what_the_model_wrote():
    assert read("43\n", "+\n", "raw", ("\n",))[:2] == ("43\n", "+\n")
    assert read("43\n", "\n+", "raw", ("\n",))[:2] == ("43\n", "\n+")
    assert read("8\n\n", "why?", "chat", ("\n\n",))[:2] == ("8\n\n", "User: why?\n\nAssistant:")
    assert read("8 stop", "why?", "chat", ("stop",))[:2] == ("8 stop", "\n\nUser: why?\n\nAssistant:")


def test_the_flower_template_closes_its_turn():
    assert "".join(read("8✿", "why?", "flower", ("✿",))[:2]) == "8✿\nUser✿why?✿\nBot✿<think"
    assert "".join(read("8", "why?", "flower", ("✿",), True)[:2]) == "8✿\nUser✿why?✿\nBot✿<think"


def test_blank_lines_in_a_reply_do_not_end_its_turn_and_raw_replies_stay_as_they_are():
    assert "User: a\nb\n\nAssistant:" in read("8", "a\n\n\nb\n", "chat")[1]
    assert read("8", "a\n\n\nb\n", "raw")[1] == "a\n\n\nb\n"


@pytest.mark.parametrize("reply", ["größer 😀", "数字", "\ud800", "a\0b"])
def test_replies_of_any_characters_are_read(reply):
    assert read("8", reply, "raw")[1] == reply.replace("\ud800", "\ufffd")


def test_after_an_end_token_and_an_empty_reply_the_end_token_is_read():
    assert read("8", "", "raw", is_ended=True)[2] == ([END_ID], [])
    assert read("8", "", "raw")[2] == (WORLD.encode("8"), [])


def session_of(environment, tmp_path, limits=FOUR, **options):
    """The embedded model with an environment that is a Python object."""
    task = Task(
        "t", {"train": [Problem("3 7 10=24:", "", {"i": 0}), Problem("1 2 3=6:", "", {"i": 1})]}.__getitem__, None, "1",
        (), 6, "raw", environment=environment, limits=limits,
    )  # fmt: skip
    config = build({"model": "tiny", "task": "t", "threads": 1, "device": "cpu", "slots": 8, **options}, "train")
    return config, open_session(config, task), task


def run(environment, tmp_path, limits=FOUR, **options):
    config, session, task = session_of(environment, tmp_path, limits, **options)
    scorer = Scorer(lambda answers: pytest.fail("nothing is scored"))
    with open_scorers(config, scorer) as scorers, open_environments(config, session, task) as session:
        answers = answer(session, task.problems("train"), scorers=scorers)
        return answers, collect(answers, scorers)


class Never:
    """Replies for ever, and notes what it hears."""

    heard = None

    def __init__(self, problem):
        self.texts = Never.heard = []

    def reply(self, text):
        self.texts.append(text)
        return Reply("=", 0.125)


def test_the_limit_on_turns_ends_an_episode_with_what_its_turns_have_earned(tmp_path):
    answers, scores = run(Never, tmp_path)
    for episode in answers.episodes.values():
        assert (len(episode.turns), episode.finish, episode.reward) == (4, "turns", 0.5)
    assert scores.rewards == [0.5, 0.5] and len(Never.heard) == 4
    counted = count(answers, scores)
    assert (counted.episodes, counted.turns, counted.episodes_cut, counted.episodes_failed) == (2, 8, 2, 0)
    assert lengths(counted)["turns_per_episode"] == 4


def test_the_limit_on_tokens_counts_answers_and_replies(tmp_path):
    for tokens in range(1, 30):
        answers, _ = run(Never, tmp_path, Limits(100, tokens))
        for episode in answers.episodes.values():
            assert episode.finish == "tokens" and episode.num_sampled + episode.num_replied <= tokens
            assert tokens - (episode.num_sampled + episode.num_replied) <= 1, "a reply of one token needs one more"


def test_the_transcript_is_what_was_read_and_the_turns_are_for_people(tmp_path):
    answers, scores = run(Never, tmp_path)
    episode = answers.episodes[0]
    assert answers.texts[0] == "=".join(turn.answer for turn in episode.turns)
    row = json.loads(json.dumps(readable(answers, scores)[0]))
    assert row["completion"] == answers.texts[0]
    assert row["turns"][0] == {"answer": episode.turns[0].answer, "reply": "=", "reward": 0.125}


def test_tokens_read_are_those_of_prompts_answers_and_replies(tmp_path):
    answers, _ = run(Never, tmp_path)
    session = session_of(Never, tmp_path)[1]
    prompts = sum(len(session.tokenizer.encode(problem.prompt)) for problem in answers.problems)
    written = sum(episode.num_sampled + episode.num_replied for episode in answers.episodes.values())
    assert answers.rollout.num_read == prompts + written - len(answers.texts)  # nobody reads the very last token


@pytest.mark.parametrize(
    ("said", "reward", "finish", "cause"),
    [
        (Done(0.5), 0.5, "done", ""),
        (Done(None), None, "done", ""),
        ("", 0.0, "turns", ""),
        ("1000 words", 0.0, "failed", "vocabulary cannot express"),
        ("größer", 0.0, "failed", "vocabulary cannot express"),
        (7, 0.0, "failed", "got int"),
        ("=" * 59, 0.0, "tokens", ""),
        ("=" * 1_000_000, 0.0, "tokens", ""),
    ],
)
def test_what_an_environment_may_say_at_once(tmp_path, said, reward, finish, cause):
    class Once:
        def __init__(self, problem):
            pass

        def reply(self, text):
            return said

    answers, scores = run(Once, tmp_path, reward_error_limit=1.0)
    assert {(e.reward, e.finish) for e in answers.episodes.values()} == {(reward, finish)}
    assert scores.rewards == [reward] * 2 and scores.errors == (2 if finish == "failed" else 0)
    assert all(cause in found for found in scores.causes.values()) and len(scores.causes) == scores.errors


def test_too_many_failed_environments_stop_a_run(tmp_path):
    class Failing:
        def __init__(self, problem):
            raise ValueError("no such game")

    config, session, task = session_of(Failing, tmp_path)
    with open_scorers(config, object()) as scorers, open_environments(config, session, task) as session:
        answers = answer(session, task.problems("train") * 8)
        with pytest.raises(RewardError, match="no such game"):
            collect_all(answers, scorers)


def collect_all(answers, scorers):
    from rwkv_es.environment.episodes import with_episodes
    from rwkv_es.reward.sheet import Scores

    return with_episodes(Scores([None] * len(answers.texts), 0, 0, ""), answers.episodes, scorers.error_limit)


def test_a_model_whose_logits_are_not_finite_ends_its_episode_without_a_reward(tmp_path):
    config, session, task = session_of(Never, tmp_path)
    session.model.params["head.weight"][:] = torch.nan
    with open_environments(config, session, task) as session:
        answers = answer(session, task.problems("train"))
    assert [episode.finish for episode in answers.episodes.values()] == ["broken"] * 2
    assert answers.broken == [0, 1] and answers.episodes[0].reward is None


def test_a_reward_of_ones_own_is_refused_beside_an_environment():
    from rwkv_es.reward.pool import RewardPool

    with pytest.raises(RewardError, match="leave --reward out"):
        RewardPool("guess_mini", "", 1, 5.0, 0.5, reward="builtin:format")


def test_limits_of_the_options_replace_the_tasks(tmp_path):
    def limits(**options):
        config = build({"model": "tiny-guess", "task": "guess_mini", "device": "cpu", **options}, "train")
        return open_session(config, load_task("guess_mini")).parts[0].setting.limits

    assert limits() == (20, 120, float("inf"))
    assert limits(max_turns=5) == (5, 30, float("inf"))
    assert limits(max_new_tokens=2, max_episode_tokens=50, max_episode_seconds=3) == (20, 50, 3.0)


class Paying(Never):
    """Pays for what there is when a limit ends it."""

    def cut(self):
        return len(self.texts) / 4


class PayingNothing(Never):
    def cut(self):
        return Done(None)


class BreakingInTheEnd(Never):
    def cut(self):
        raise ValueError("no score for this")


@pytest.mark.parametrize("limits", [FOUR, Limits(100, 24)])
def test_an_environment_may_pay_for_an_episode_that_a_limit_has_ended(tmp_path, limits):
    answers, scores = run(Paying, tmp_path, limits)
    for episode, reward in zip(answers.episodes.values(), scores.rewards):
        assert episode.finish == ("turns" if limits is FOUR else "tokens")
        assert reward == len(episode.turns) * (0.125 + 0.25) > 0
    assert count(answers, scores).episodes_cut == 2


def test_one_that_cannot_be_scored_has_no_reward_and_one_that_fails_then_is_counted(tmp_path):
    assert run(PayingNothing, tmp_path)[1].rewards == [None, None]
    answers, scores = run(BreakingInTheEnd, tmp_path)
    assert scores.rewards == [0.0, 0.0] and scores.errors == 2 and "no score for this" in scores.first_error
    assert count(answers, scores).episodes_failed == 2
