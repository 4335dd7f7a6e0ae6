"""The report: a page that needs nothing else and is safe to open, and a curve for the terminal."""

import json
import math
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from rwkv_es.errors import ConfigError
from rwkv_es.measure.report import curve, series, write_report

EVIL = "</pre><script>alert('x')</script> & \"数\""


class Page(HTMLParser):
    """Collects what the page contains."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.points, self.bands = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        assert not {"src", "href"} & values.keys()
        if "points" in values:
            points = [tuple(map(float, point.split(","))) for point in values["points"].split()]
            (self.bands if tag == "polygon" else self.points).append(points)

    def handle_data(self, data):
        self.text += data


def write_run(folder, metrics, samples=()):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("task: copy & paste\nmade_with:\n  torch: 2.13.0\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder


def test_the_page_shows_curves_last_metrics_and_samples_and_escapes_every_text(tmp_path):
    metrics = [{"step": 0, "eval/accuracy": 0.25}]
    metrics += [{"step": i, "reward_mean": i / 4, "reward_std_of_members": 0.125, EVIL: "<b>"} for i in range(5)]
    metrics += [{"step": 4, "eval/accuracy": 0.75}]
    samples = [{"step": 4, "prompt": EVIL, "completion": EVIL, "reward": None}]
    path = write_report(write_run(tmp_path / "<run>", metrics, samples))
    page = Page(path.read_text(encoding="utf-8"))
    assert path.name == "report.html"
    assert not {"script", "b", "img", "link"} & set(page.tags)
    assert page.text.count(EVIL) == 3
    assert page.text.count("copy & paste · <run>") == 2
    assert "reward missing" in page.text
    assert "eval/accuracy0.75" in page.text
    assert [len(points) for points in page.points] == [5, 2]
    rising, accuracy = page.points
    assert all(after[0] > before[0] and after[1] < before[1] for before, after in pairwise(rising))
    assert accuracy[0][0] == rising[0][0]
    assert accuracy[1][0] == rising[-1][0]
    (band,) = page.bands
    assert [x for x, _ in band] == [x for x, _ in rising] + [x for x, _ in rising[::-1]]
    assert all(over[1] < middle[1] < under[1] for over, middle, under in zip(band, rising, band[::-1]))


def test_a_run_that_has_just_begun_or_is_not_finite_has_a_page(tmp_path):
    metrics = [{"step": 0, "reward_mean": None}, {"step": 1, "reward_mean": 0.5}]
    assert "0.5" in write_report(write_run(tmp_path / "run", metrics)).read_text()
    assert write_report(write_run(tmp_path / "run", [])).exists()


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


def test_series_leaves_out_what_is_not_a_number():
    rows = [{"step": 0, "a": 1}, {"step": 1, "a": math.nan}, {"step": 2, "a": None}, {"step": 3, "a": 2.0, "s": 0.5}]
    assert series(rows, "a", "s") == ([0, 3], [1, 2.0], [0.0, 0.5])


def test_a_curve_rises_where_the_values_rise():
    assert curve([0.0, 1.0, 2.0, 3.0], width=7, height=2).splitlines() == [
        "   3.000 │  ▃█",
        "   0.000 │▁▆██",
    ]


def test_a_short_curve_is_widened_evenly():
    assert curve([0.0, 1.0], width=5, height=1) == "   1.000 │▁▁██"
    assert curve([0.0, 1.0], height=1) == "   1.000 │▁▁▁▁████"


def test_a_long_curve_is_thinned_and_keeps_its_end():
    rows = curve([0.0] * 999 + [1.0], width=20, height=1).splitlines()
    assert rows == ["   1.000 │" + "▁" * 19 + "█"]


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_nothing_to_draw_is_said(values):
    assert curve(values) == "(nothing to draw yet)"


def test_a_flat_curve_is_flat():
    assert curve([0.5, 0.5], height=1) == "   0.500 │▁▁▁▁▁▁▁▁"
