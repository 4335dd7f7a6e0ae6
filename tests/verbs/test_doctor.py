"""The pre-flight: gold answers, spread of rewards, suggestions and warnings."""

import json

import jobs
import pytest

from rwkv_es.cli import main
from rwkv_es.config.options import Config
from rwkv_es.measure.console import held_out_line
from rwkv_es.planning.preflight import Gold, preflight
from rwkv_es.planning.probing import (
    Base,
    Proposal,
    Spread,
    climb,
    suggest_lr,
    suggest_population,
    suggest_prompts,
    suggest_sigma,
    suggest_targets,
)
from rwkv_es.run.ledger import read_metrics
from rwkv_es.session import open_scorers, open_session
from rwkv_es.system.errors import ConfigError
from rwkv_es.task.task import SPLITS
from rwkv_es.verbs import doctor
from rwkv_es.verbs.doctor import Findings, warnings, within_walk

GOOD = Gold(10, "", 20, 0, (5, 6, 7))
MOVING = Spread(1e-3, 0.3, 0.1, 0.5, 0.4)
STILL = Spread(1e-3, 0.3, 0.0, 0.0, 0.0)
OPTIONS = Proposal(1e-3, 1e-3, {"matrices": 1.0}, 8, 64)

TASK = """
from rwkv_es.task import Problem

VERSION, STOP, MAX_NEW_TOKENS, TEMPLATE = "1", (), 8, "raw"


def problems(split, data=""):
    return [Problem(f"{i} 2 3=6:", "<answer>1+2+3</answer>", {"worth": float(i != WRONG)}) for i in range(1, 6)]


def reward(problem, text):
    return problem.meta["worth"] * ("<answer>1+2+3</answer>" in text)
"""


def written(tmp_path, wrong):
    (tmp_path / "own.py").write_text(TASK.replace("WRONG", str(wrong)))
    return str(tmp_path / "own.py")


def test_the_embedded_model_and_task_are_found_fit(capsys):
    options = ["--threads", "1", "--eval-size", "10", "--prompts", "4", "--max-new-tokens", "60"]
    assert main(["doctor", "tiny", *options, "--sigma", "0.003"]) == 0
    *screen, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["gold"]["num_checked"] == 20 and result["gold"]["wrong"] == ""
    assert result["gold"]["prompt_tokens"] == [8, 8, 8], "three numbers below 10 or 10 itself, a target and three signs"
    assert list(result["spreads"]) == ["matrices", "head.weight", "emb.weight"]
    for spreads in result["spreads"].values():
        assert spreads[0]["share_changed"] <= 0.25 and spreads[-1]["share_changed"] > 0.5, "from little to much"
        assert 0.003 in [spread["sigma"] for spread in spreads]
    assert all(len(line) < 160 for line in screen)
    suggestion = next(line for line in screen if line.startswith("suggestion"))
    assert f"--sigma {result['suggested']['sigma']:g} --lr {result['suggested']['lr']:g} --targets " in suggestion


@pytest.mark.parametrize(("targets", "rank"), [("matrices=1", 2), ("vectors=1", 1)])  # kernels, and plain torch
def test_products_are_examined_as_those_of_a_training(targets, rank, tmp_path, monkeypatch):
    """The engine, and with it the products, follow from the targets and the rank."""
    asked = []

    def examine(model, slots, threads, **how):
        asked.append((slots, threads, how))
        raise ConfigError("enough")

    monkeypatch.setattr("rwkv_es.engine.engines.examine", examine)
    options = ["--model", "tiny", "--targets", targets, f"--rank={rank}", "--slots", "40", "--device", "cpu"]
    assert main(["doctor", *options]) == 2 and main(["train", *options, "--run", str(tmp_path)]) == 2
    assert len(asked) == 2 and asked[0] == asked[1]


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "lr"), [("0.03", "0.02"), ("0.0003", "0.0002")])
def test_what_is_proposed_learns_where_sigma_and_lr_are_wrong_by_a_factor_of_ten(sigma, lr, tmp_path, capsys):
    """0.003 with 0.002 to 0.02 and a multiplier for the head would do; half a minute of one core each."""
    assert main(["doctor", "tiny", "--threads", "1", "--sigma", sigma, "--lr", lr]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("suggestion"))
    flags = line.split()[1:]
    others = ["--steps", "8", "--eval-every", "8", "--threads", "1", "--slots", "512", "--run", str(tmp_path / "run")]
    assert main(["train", "--model", "tiny", *flags, *others]) == 0
    before, after = [row["eval/accuracy"] for row in read_metrics(tmp_path / "run") if "eval/accuracy" in row]
    assert before < 0.15 and after > before + 0.5


def test_noise_that_changes_nothing_is_raised_until_something_does():
    def spread_at(sigma):
        tried.append(sigma)
        changed = 0.0 if sigma < 1 else 0.6 if sigma < 4 else 1.0
        return Spread(sigma, 0.3, 0.2 * (1 <= sigma < 16), 0.5, changed)

    tried = []
    assert [spread.sigma for spread in climb(spread_at, 0.5)] == [0.5, 2, 8, 32] == tried
    tried = []
    assert [spread.sigma for spread in climb(spread_at, 8)] == [0.5, 2, 8, 32]
    assert len(climb(lambda sigma: Spread(sigma, 0.3, 0.0, 0.0, 0.0), 1e-9)) == 7, "there is an end to it"


def test_the_first_gold_answer_that_is_wrong_is_named_and_the_exit_code_says_so(tmp_path, capsys):
    options = ["--threads", "1", "--prompts", "2", "--task", written(tmp_path, wrong=3)]
    assert main(["doctor", "tiny", *options]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["warnings"][0].startswith("train problem 3 ('3 2 3=6:')")
    assert "train problem 3 ('3 2 3=6:'): its answer scores 0.0, not 1.0" in err


def test_gold_answers_are_scored_as_they_would_be_read(tmp_path):
    """A stop string of the task cuts them; those longer than an answer may get are counted."""
    text = TASK.replace("STOP, MAX", "STOP, MAX").replace('"1", (), 8', '"1", ("</",), 8').replace("WRONG", "0")
    (tmp_path / "own.py").write_text(text)
    config = Config(task=str(tmp_path / "own.py"), threads=1, reward_workers=0)
    session = open_session(config)
    with open_scorers(config) as scorers:
        gold = doctor.check_gold(session, scorers, 2, SPLITS)
    length = len(session.tokenizer.encode("<answer>1+2+3</answer>"))
    assert gold.wrong.startswith("train problem 1")
    assert (gold.num_checked, gold.longest, gold.num_too_long) == (4, length, 4 if length > 8 else 0)


OWN_REWARD = """
def likes_marks(completions, completion_ids, **columns):
    assert completion_ids[0], "no ids"
    return [float("<answer>" in completion) for completion in completions]


def pays_nothing(completion):
    return 0.0
"""


def trained(tmp_path, task, **options):
    """Train for a step; return the exit code."""
    run = {**jobs.SMALL, "run": tmp_path / "run", "task": task, "steps": 1, "eval_size": 2, **options}
    return main(["train", *(f"--{name}={value}" for name, value in run.items())])


def test_training_refuses_a_task_that_does_not_pay_its_answers_until_that_is_mended(tmp_path, capsys):
    assert trained(tmp_path, written(tmp_path, wrong=3)) == 2
    out, err = capsys.readouterr()
    assert "train problem 3 ('3 2 3=6:'): its answer scores 0.0, not 1.0" in err and "mend the answers" in err
    assert out == "" and (tmp_path / "run" / "ledger.jsonl").read_text() == ""
    (tmp_path / "mended").mkdir()
    assert trained(tmp_path, written(tmp_path / "mended", wrong=0)) == 0, "no step was taken: all may be changed"


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_more_prompts_than_problems_are_refused_before_any_work(tmp_path, capsys, monkeypatch, verb):
    for module in ("verbs.upkeep", "verbs.train", "verbs.doctor"):
        monkeypatch.setattr(f"rwkv_es.{module}.answer", lambda *_, **__: pytest.fail("the model was asked"))
    task = written(tmp_path, wrong=0)
    own = ["--run", str(tmp_path / "run")] if verb == "train" else []
    assert main([verb, "--model", "tiny", "--task", str(task), "--prompts", "900", "--threads", "1", *own]) == 2
    assert "prompts is 900, but the task has 5 training problems; try --prompts 5" in capsys.readouterr().err


def test_an_answer_that_is_not_known_is_not_scored(tmp_path):
    text = TASK.replace("WRONG", "0").replace('"<answer>1+2+3</answer>", {', '"<answer>1+2+3</answer>" * (i > 4), {')
    (tmp_path / "own.py").write_text(text)
    assert trained(tmp_path, tmp_path / "own.py") == 0
    (tmp_path / "own.py").write_text(text.replace("i > 4", "0"))
    assert trained(tmp_path, tmp_path / "own.py", run=tmp_path / "again") == 0


@pytest.mark.parametrize("function, is_said", [("likes_marks", False), ("pays_nothing", True)])
def test_a_reward_of_your_own_may_not_pay_them_which_is_said(tmp_path, capsys, function, is_said):
    (tmp_path / "rewards.py").write_text(OWN_REWARD)
    assert trained(tmp_path, written(tmp_path, wrong=3), reward=f"{tmp_path / 'rewards.py'}:{function}") == 0
    assert ("scores 0.0, not 1.0 (with the reward you gave)" in capsys.readouterr().err) == is_said


def test_an_answer_that_the_vocabulary_cannot_express_is_named(tmp_path, capsys):
    (tmp_path / "own.py").write_text(TASK.replace("WRONG", "0").replace('"<answer>1+2+3</answer>", {', '"six", {'))
    assert trained(tmp_path, tmp_path / "own.py") == 2
    assert "an answer cannot be written: the model's vocabulary cannot express 'six'" in capsys.readouterr().err
    (tmp_path / "rewards.py").write_text(OWN_REWARD)
    assert trained(tmp_path, tmp_path / "own.py", reward=f"{tmp_path / 'rewards.py'}:likes_marks") == 0
    assert "cannot express 'six'" in capsys.readouterr().err


def test_a_run_that_has_begun_is_not_looked_at_again(tmp_path, monkeypatch):
    task = written(tmp_path, wrong=0)
    assert trained(tmp_path, task) == 0
    monkeypatch.setattr("rwkv_es.verbs.train.preflight", lambda *_: pytest.fail("looked at again"))
    assert trained(tmp_path, task, steps=2) == 0


def test_before_training_it_is_said_that_all_held_out_answers_score_alike(tmp_path, capsys):
    assert trained(tmp_path, "countdown_mini", max_new_tokens=1, eval_every=1) == 0  # one token is never an answer
    first, last = [line for line in capsys.readouterr().out.splitlines() if "held out" in line]
    assert "all score alike: `rwkv-es doctor`" in first and "alike" not in last
    found = {"eval/accuracy": 0.5, "eval/reward": 0.5, "eval/problems": 2, "eval/tokens_per_answer": 1}
    assert "alike" not in held_out_line(0, found) and "alike" in held_out_line(0, {**found, "eval/accuracy": 1.0})


def test_without_evaluation_the_test_split_is_not_asked_for(tmp_path):
    text = TASK.replace("WRONG", "0").replace("    return [P", '    assert split == "train"\n    return [P')
    (tmp_path / "own.py").write_text(text)
    assert trained(tmp_path, tmp_path / "own.py", eval_every=0) == 0


def test_all_processes_end_alike_when_an_answer_is_not_paid(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_LOGS", str(tmp_path))
    argv = jobs.arguments(tmp_path / "run", task=written(tmp_path, wrong=3))
    try:
        codes, outputs = jobs.run_together(2, argv)
    finally:
        jobs.end_all()
    assert codes == [2, 2], outputs
    assert "not 1.0" in outputs[0] and outputs[1] == ""


def test_what_does_not_fit_is_said(tmp_path, capsys):
    config = Config(threads=1, reward_workers=0, max_new_tokens=5)
    session = open_session(config)
    with open_scorers(config) as scorers:
        preflight(config, session._replace(base_path=tmp_path / "rwkv7-ctx12-tiny.pth"), scorers)
    too_long, context = capsys.readouterr().err.splitlines()
    assert too_long == "rwkv-es: 64 gold answers are longer than an answer may get; raise --max-new-tokens"
    assert "may have 13 tokens, but the model was trained on 12" in context


def test_the_sigma_with_the_strongest_signal_is_suggested_unless_it_breaks_the_model():
    low, middle, high = Spread(1, 0.4, 0.01, 0.1, 0.1), Spread(2, 0.3, 0.1, 0.5, 0.5), Spread(4, 0.1, 0.2, 0.7, 0.9)
    assert suggest_sigma(0.4, [low, middle, high]) == middle
    assert suggest_sigma(0.15, [low, middle, high]) == high
    assert suggest_sigma(1.0, [high]) == high
    costs = [Spread(1, -0.3, 0.01, 0.1, 0.1), Spread(2, -0.38, 0.1, 0.5, 0.5), Spread(4, -0.9, 0.2, 0.7, 0.9)]
    assert suggest_sigma(-0.3, costs) == costs[1], "rewards may be negative"


def test_without_any_signal_the_sigma_that_changes_half_of_the_answers_is_suggested():
    spreads = [Spread(sigma, 0.0, 0.0, 0.0, changed) for sigma, changed in ((1, 0.0), (2, 0.4), (4, 1.0))]
    assert suggest_sigma(0.0, spreads).sigma == 2


def test_groups_with_half_the_strongest_signal_are_trained_together():
    def group(sigma, signal):
        return [Spread(sigma, 0.3, signal, 0.5, 0.5)]

    found = {"matrices": group(0.01, 0.1), "head.weight": group(0.04, 0.06), "emb.weight": group(0.1, 0.04)}
    assert suggest_targets(0.3, found) == (0.01, {"matrices": 1, "head.weight": 4})
    assert suggest_targets(0.3, {"matrices": group(0.01, 0.0), "head.weight": group(0.04, 0.1)}) == (
        0.04,
        {"head.weight": 1},
    )
    assert suggest_targets(0.3, {"matrices": group(0.01, 0.0), "head.weight": group(0.04, 0.0)}) == (
        0.01,
        {"matrices": 1},
    )


def test_a_step_moves_an_entry_by_a_third_of_sigma():
    """lr / N * sum of N products of fitness and noise, both of some variance, is lr * std / sqrt(N) large."""
    lr = suggest_lr(0.02, 64, 0.5)
    assert lr * 0.5 / 64**0.5 == pytest.approx(0.3 * 0.02)


def test_members_follow_from_the_share_of_pairs_that_differ():
    assert [suggest_population(share) for share in (1.0, 0.25, 0.01, 0.0)] == [64, 128, 1024, 1024]


def test_a_large_model_is_not_sent_on_a_long_walk():
    proposal = Proposal(1e-3, 1e-2, {"matrices": 1.0}, 8, 64)
    assert within_walk(Config(steps=100), proposal, 64) == proposal
    assert within_walk(Config(steps=100), proposal, 2048).lr == pytest.approx(1e-3 * 8 / 10)  # total 1e-3 = lr/8 * 10


def test_prompts_follow_from_the_share_with_signal():
    assert [suggest_prompts(share) for share in (1.0, 0.5, 0.3, 0.0)] == [4, 8, 14, None]


@pytest.mark.parametrize(
    ("findings", "words"),
    [
        (
            Findings(GOOD, Base([1.0, 1.0], ["", ""], 1.0), {"matrices": [MOVING]}, OPTIONS, MOVING),
            "gets every problem right",
        ),
        (
            Findings(GOOD, Base([0.0, 0.0], ["", ""], 1.0), {"matrices": [MOVING]}, OPTIONS, MOVING),
            "scores 0 on every problem",
        ),
        (
            Findings(GOOD, Base([1.0, 0.0], ["", ""], 1.0), {"matrices": [STILL, STILL]}, OPTIONS, STILL),
            "a step would move nothing",
        ),
        (
            Findings(GOOD, Base([1.0, 0.0], ["", ""], 0.2), {"matrices": [MOVING]}, OPTIONS, MOVING),
            "only 20% of the answers",
        ),
        (
            Findings(
                GOOD._replace(num_too_long=3), Base([1.0, 0.0], ["", ""], 1.0), {"matrices": [MOVING]}, OPTIONS, MOVING
            ),
            "3 gold answers",
        ),
        (
            Findings(
                GOOD._replace(wrong="it is wrong"),
                Base([1.0, 0.0], ["", ""], 1.0),
                {"matrices": [MOVING]},
                OPTIONS,
                MOVING,
            ),
            "it is wrong",
        ),
    ],
)
def test_a_warning_for_each_trouble(findings, words):
    (warning,) = warnings(Config(), findings)
    assert words in warning
    fit = Findings(GOOD, Base([1.0, 0.0], ["", ""], 1.0), {"matrices": [MOVING, STILL]}, OPTIONS, MOVING)
    assert list(warnings(Config(), fit)) == []
