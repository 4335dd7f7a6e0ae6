"""The page about runs: whole in one file, safe to open, right in a browser of two widths."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from browser import chromium
from folders import rising, write_run

from rwkv_es.measure.page import charts_of, names_of, write_report
from rwkv_es.measure.reading import axes, chosen_samples, curves, thinned
from rwkv_es.system.errors import ConfigError

EVIL = "</pre></script><script>alert('x')</script><!-- & \"数\""


class Page(HTMLParser):
    """Collects what the page contains."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.data, self._is_data = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        self._is_data = values.get("id") == "data"

    def handle_data(self, data):
        if self._is_data:
            self.data += data


def read(path):
    page = Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.data)


def test_the_page_holds_every_text_and_number_and_none_of_them_as_markup(tmp_path):
    metrics = [*rising(4), {"step": 4, EVIL: 0.5, "text": "<b>", "nothing": None}]
    samples = [{"step": 4, "kind": "best", "prompt": EVIL, "completion": EVIL, "reward": None}]
    path = write_report(write_run(tmp_path / "<run>", metrics, samples))
    page, data = read(path)
    assert path == tmp_path / "<run>" / "report.html"
    assert page.addresses == ["data:,"] and page.tags.count("script") == 2 and "b" not in page.tags
    (run,) = data["runs"]
    assert run["samples"] == [{"step": 4, "kind": "best", "prompt": EVIL, "completion": EVIL, "reward": None}]
    assert run["series"][EVIL]["values"] == [0.5] and not {"text", "nothing"} & run["series"].keys()
    assert run["series"]["reward_mean"] == {"at": [1, 2, 3, 4], "values": [0.1, 0.2, 0.3, 0.4]}
    assert run["options"] == {"task": "copy & paste", "model": "tiny", "steps": "4", "lr": "0.001"}
    assert (run["steps"], run["planned"], run["state"], run["before"]) == (4, 4, "finished", 0.1)
    assert "copy &amp; paste" not in path.read_text() and "<title>&lt;run&gt;</title>" in path.read_text()


def test_a_run_that_has_just_begun_or_is_not_finite_has_a_page(tmp_path):
    _, data = read(write_report(write_run(tmp_path / "run", [{"step": 0, "reward_mean": None}])))
    assert data["runs"][0]["series"] == {} and data["runs"][0]["state"] == "stopped"
    assert read(write_report(write_run(tmp_path / "empty")))[1]["charts"] == []


def test_a_folder_without_a_run_is_reported(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


def test_several_runs_go_into_one_page_which_replaces_only_a_page(tmp_path):
    runs = [write_run(tmp_path / name / "run", rising(3)) for name in ("a", "b")]
    out = tmp_path / "both.html"
    assert write_report(runs, out) == out and write_report(runs, out) == out
    assert [run["name"] for run in read(out)[1]["runs"]] == ["a/run", "b/run"]
    assert all(len(chart["names"]) == 1 for chart in read(out)[1]["charts"])
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"both\.html exists and is no report"):
        write_report(runs, out)
    assert out.read_text() == "mine"


def test_names_are_as_long_as_they_have_to_be(tmp_path):
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]


def test_time_leaves_pauses_out_and_is_added_up_for_runs_of_earlier_releases():
    rows = [{"step": 1, "tokens_read": 10, "elapsed_s": 4.0}, {"step": 2, "tokens_read": 5, "elapsed_s": 9.0}]
    assert axes(rows) == {"step": [1, 2], "elapsed": [4.0, 9.0], "tokens": [10.0, 15.0]}
    old = [{"step": 0}, {"step": 1, "generate_s": 2.0, "update_s": 1.0}, {"step": 2, "generate_s": 3.0}]
    assert axes(old)["elapsed"] == [0.0, 3.0, 6.0]


def test_curves_leave_out_what_is_not_a_number():
    rows = [{"step": 0, "a": 1}, {"step": 1, "a": math.nan}, {"step": 2, "a": None}, {"step": 3, "a": 2.0, "s": "x"}]
    assert curves(rows) == {"a": {"at": [0, 3], "values": [1.0, 2.0]}}


def test_long_runs_are_thinned_but_keep_their_evaluations_and_their_end():
    rows = [{"step": i} for i in range(100)]
    rows[37]["eval/reward"] = 1.0
    assert thinned(rows, 10) == [0, 10, 20, 30, 37, 40, 50, 60, 70, 80, 90, 99]
    assert thinned(rows[:5], 10) == [0, 1, 2, 3, 4] and thinned([], 10) == []


def test_answers_are_of_steps_all_over_the_run_and_of_the_first_and_last_evaluation():
    rows = [{"step": i, "kind": "best"} for i in range(1000)] + [{"step": i, "kind": "held out"} for i in range(50)]
    kept = list(chosen_samples(rows))
    held, others = ([s["step"] for s in kept if (s["kind"] == "held out") == flag] for flag in (True, False))
    assert len(held) == 8 and len(others) == 150
    assert (held[0], held[-1], others[0], others[-1]) == (0, 49, 0, 999)


def test_what_rewards_and_evaluation_sets_are_named_has_charts_of_its_own():
    names = ["eval/reward", "eval/gsm8k/reward", "reward/a", "reward/b", "log/chars", "wait_s_of_rank_0"]
    titles = [(chart["title"], chart["names"]) for chart in charts_of(names)]
    assert ("Held out: gsm8k/reward", ["eval/gsm8k/reward"]) in titles
    assert ("Rewards by name", ["reward/a", "reward/b"]) in titles and ("Waiting", ["wait_s_of_rank_0"]) in titles


def test_episodes_and_reference_answers_have_charts_and_pairs_are_told_apart():
    names = [f"{start}{name}" for start in ("", "eval/") for name in ("turns_per_episode", "nats_per_token")]
    assert [chart["title"] for chart in charts_of([*names, "generate_s", "score_s"], is_split=True)] == [
        *("Reference answers", "Reference answers, held out", "Turns an episode", "Turns an episode, held out"),
        *("Time of a step: generate_s", "Time of a step: score_s"),
    ]


@pytest.mark.parametrize("turns", [None, 7, "x", [1, None], [{"reward": "x"}, {"answer": None, "reward": math.nan}]])
def test_turns_of_a_damaged_file_break_nothing(turns):
    (sample,) = chosen_samples([{"step": 1, "kind": "best", "turns": turns}])
    assert all(turn == ("", "", 0.0) for turn in sample.get("turns", ()))


def answers():
    for step in (0, 4):
        for i in range(8):
            text = f"held {i} of step {step}"
            yield {"step": step, "kind": "held out", "prompt": f"question {i}", "completion": text, "reward": step / 4}
    for step in range(1, 5):
        for kind in ("best", "worst"):
            yield {"step": step, "kind": kind, "prompt": "Why?", "completion": f"{kind} {step} {EVIL}", "reward": 0.5}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_runs_are_drawn_compared_and_searched_without_a_complaint_or_a_request(tmp_path, browser, width):
    runs = [write_run(tmp_path / name, rising(4, slope), list(answers())) for name, slope in (("a", 0.1), ("b", 0.2))]
    page = write_report(runs, tmp_path / "both.html")
    browser.open(page, width)
    assert browser.run("return document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
    count = "return document.querySelectorAll('{}').length"
    assert browser.run(count.format("#charts figure:not([hidden]) svg")) == browser.run("return data.charts.length") > 8
    first = "document.querySelector('#charts figure')"
    assert browser.run(f"return {first}.querySelectorAll('path').length") == 2, "one line a run"
    ticks = f"return [...{first}.querySelectorAll('text')].map((text) => text.textContent).join(' ')"
    assert "4" in browser.run(ticks).split() and " s" not in browser.run(ticks)
    browser.press("t")
    assert " s" in browser.run(ticks)
    browser.run("document.querySelector('#runs button').click()")
    assert browser.run(f"return {first}.querySelectorAll('path').length") == 1, "a run is hidden"
    browser.press("/")
    browser.press("best 3")
    found = "return [...document.querySelectorAll('#samples article')].map((one) => one.textContent)"
    (text,) = browser.run(found)
    assert EVIL in text and browser.run(count.format("#samples mark")) == 1
    browser.run(
        "const held = document.getElementById('find-held'); held.value = 'question 7'; held.dispatchEvent(new Event('input'))"
    )
    (pair,) = browser.run(found.replace("#samples", "#held"))
    assert re.search(r"before.*held 7 of step 0.*after step 4.*held 7 of step 4", pair)
    browser.run(f"{first}.focus()")
    browser.press(["\ue014"])  # arrow to the right
    assert browser.run(f"return {first}.querySelector('.read').textContent").startswith("time 1 s")
    assert browser.complaints() == []
    assert browser.requests(page) == [page.resolve().as_uri()]


def test_in_a_browser_an_episode_is_read_turn_by_turn(tmp_path, browser):
    turns = [{"answer": f"{EVIL}\n", "reply": "+\n", "reward": 0.0}, {"answer": "40", "reply": "", "reward": 0.25}]
    sample = {"step": 1, "kind": "best", "prompt": "8:", "completion": f"{EVIL}\n+\n40", "reward": 0.25, "turns": turns}
    browser.open(write_report(write_run(tmp_path / "run", rising(2), [sample])), 390)
    shown = "[...document.querySelectorAll('#samples .turns div')].map((turn) => [...turn.children].map((one) => one.textContent))"
    assert browser.run(f"return {shown}") == [[EVIL, "+"], ["40", "", "0.25"]]
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    assert browser.complaints() == []


def test_a_page_asked_for_by_its_place_in_the_run_may_be_replaced_by_the_run(tmp_path):
    folders = [write_run(tmp_path / name, rising(2)) for name in ("a", "b")]
    write_report(folders[0], folders[0] / "report.html")
    write_report(folders, folders[0] / "report.html")
    write_report(folders[0])
    (folders[0] / "report.html").write_text("mine")
    with pytest.raises(ConfigError, match="not written by this run"):
        write_report(folders[1], folders[0] / "report.html")
