"""Tables: plain columns where a program may read them, drawn ones on a terminal."""

import pytest

from rwkv_es.system.tables import show

ROWS = [("accuracy", "0.5"), ("reward [bold]", "0.25 ✿")]


def test_in_a_pipe_columns_are_plain(capsys):
    show(("", "base"), ROWS, "a title")
    assert capsys.readouterr().out == "a title\n               base\naccuracy       0.5\nreward [bold]  0.25 ✿\n"
    show(("", ""), ROWS)
    assert capsys.readouterr().out == "accuracy       0.5\nreward [bold]  0.25 ✿\n", "no header, no title"


def test_on_a_terminal_all_cells_are_shown_as_they_are(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    show(("", "base"), ROWS, "a title")
    out = capsys.readouterr().out
    for text in ("a title", "base", "accuracy", "0.5", "reward [bold]", "0.25 ✿"):
        assert text in out
    assert "─" in out or "━" in out, "a rule under the header"


@pytest.mark.parametrize("columns", ["1", "8"])
def test_a_terminal_that_is_too_narrow_for_a_table_gets_plain_columns(capsys, monkeypatch, columns):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", columns)
    show(("", ""), ROWS)
    assert capsys.readouterr().out == "accuracy       0.5\nreward [bold]  0.25 ✿\n"


@pytest.mark.parametrize("columns", ["0", ""])
def test_a_terminal_of_unknown_width_gets_a_table(capsys, monkeypatch, columns):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", columns)
    show(("", "base"), ROWS)
    assert "0.25 ✿" in capsys.readouterr().out


def test_a_long_cell_is_folded_and_not_cut(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    words = [f"word{i}" for i in range(30)]
    show(("", ""), [("name", " ".join(words))])
    out = capsys.readouterr().out
    assert all(word in out for word in words)
