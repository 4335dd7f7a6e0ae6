"""A run seen from outside: in lines, on a terminal, until it ends."""

import io
import json
import subprocess
import sys
import threading
import time

import pytest
from folders import OPTIONS, rising, write_run
from jobs import arguments
from rich.console import Console

from rwkv_es.cli import main
from rwkv_es.measure import watch as watching
from rwkv_es.measure.reading import newest, standing_of
from rwkv_es.measure.watch import excerpt, line_of, screen, time_left, watch
from rwkv_es.run.ledger import read_metrics
from rwkv_es.system.lock import Lock, holder


def test_a_run_of_ones_own_is_followed_to_its_end_in_its_own_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watching, "LOOK_S", 0.05)
    folder, seen = tmp_path / "run", []

    def train():
        main(arguments(folder, steps=3, eval_every=3))

    def look():
        while not (holder(folder) and (folder / "ledger.jsonl").exists()):
            time.sleep(0.02)
        seen.append(standing_of(folder).state)

    training, looking = threading.Thread(target=train), threading.Thread(target=look)
    training.start(), looking.start()
    looking.join()
    watch(folder)
    assert not holder(folder) or standing_of(folder).num_steps == 3
    training.join()
    out = capsys.readouterr().out
    assert seen == ["running"]
    assert f"{folder}: finished after 3 of 3 steps; best held-out reward" in out
    for number in (1, 2, 3):
        assert out.count(f"step {number}/3 [") == 2, "once by the run, once by its watcher"


def test_one_that_does_not_run_is_shown_once_with_what_may_come_next(tmp_path, capsys):
    folder = write_run(tmp_path / "run", rising(3))
    assert main(["watch", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3, "its last lines but for an evaluation that lacks numbers, and its end"
    assert out[-1] == (
        f"{folder}: stopped after 3 of 4 steps; best held-out reward 0.100 after step 0; rwkv-es resume {folder} goes on"
    )


def test_a_terminal_that_is_too_narrow_gets_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    assert main(["watch", str(write_run(tmp_path / "run", rising(3)))]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_line_that_lacks_numbers_is_left_out():
    assert line_of({"step": 3}, 10) == "" and line_of({"step": 3, "eval/reward": 0.5}, 10) == ""


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_screen_fits_any_width_and_shows_the_newest_numbers(tmp_path, width):
    folder = write_run(tmp_path / "run", rising(3))
    console = Console(width=width, file=io.StringIO(), record=True)
    rows = [*read_metrics(folder), {"tokens_per_s": 12_345.4}]
    console.print(screen(standing_of(folder), rows, width))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width
    assert "step 3 of 4" in shown and "0.3" in shown and "held-out accuracy" in shown and "12,345" in shown


@pytest.mark.parametrize("command", [["watch", "run"], ["report", "run"], ["runs", "."], ["clean", "run", "--yes"]])
def test_who_looks_at_a_run_does_not_wait_for_torch(tmp_path, command):
    write_run(tmp_path / "run", rising(3))
    code = "import sys, rwkv_es.cli as c; failed = c.main(sys.argv[1:]); sys.exit(failed or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *command], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


def test_the_newest_steps_best_answer_is_shown_an_episode_turn_by_turn(tmp_path):
    turns = [{"answer": "39\n", "reply": "+\n", "reward": 0.0}, {"answer": " 40\n", "reply": "", "reward": 1.0}]
    kinds = [(1, "best", "old"), (2, "best", "39\n+\n40\n"), (2, "worst", "bad"), (2, "held out", "other")]
    samples = [{"step": s, "kind": k, "prompt": "8:", "completion": text, "turns": turns} for s, k, text in kinds]
    folder = write_run(tmp_path / "run", rising(2), samples)
    assert excerpt(newest(folder)) == "8:\n39 > +\n40 >"
    rows = [
        {"step": 3, "kind": "best", "prompt": asked, "completion": "a\n" * 50}
        for asked in ("x" * 300_000, "Why?\n\x1b[2J")
    ]
    with (folder / "samples.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + '{"torn')
    lines = excerpt(newest(folder)).split("\n")
    assert lines[0] == "Why?" and "\x1b" not in lines[1] and lines[2:] == ["a"] * 8 + ["..."]
    assert excerpt(newest(write_run(tmp_path / "none"))) == ""
    console = Console(width=60, file=io.StringIO(), record=True)
    console.print(screen(standing_of(folder), read_metrics(folder), 60, "39 > +"))
    assert "39 > +" in console.export_text()


def test_the_time_left_follows_from_the_last_steps(tmp_path):
    folder = write_run(tmp_path / "run", rising(3))
    lock = Lock(folder)
    try:
        standing = standing_of(folder)
        assert standing.state == "running" and time_left(standing, read_metrics(folder)) == "0:03 left"  # 3 s a step
    finally:
        lock.release()
    assert time_left(standing_of(folder), read_metrics(folder)) == ""


def test_names_are_no_markup(tmp_path):
    folder = write_run(tmp_path / "[red]run[bold", rising(2), options=OPTIONS.replace("copy & paste", '"[/red]x"'))
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(screen(standing_of(folder), read_metrics(folder), 200))
    assert "[red]run[bold · [/red]x · stopped" in console.file.getvalue()
