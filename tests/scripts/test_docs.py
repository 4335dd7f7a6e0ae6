"""The documentation: pages that follow from the code are current, the site builds, the first hour can be had."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from rwkv_es import cli

FIRST_HOUR = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")


def test_pages_that_follow_from_the_code_are_what_it_says(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import docs

    assert docs.main(["--check"]) == 0, capsys.readouterr().out


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} == pages - {"index"}


def test_pages_are_in_the_menu_and_every_option_and_metric_in_its_page():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(path.name in menu for path in (ROOT / "docs").glob("*.md"))
    from rwkv_es.config.options import FIELDS

    text = (ROOT / "docs" / "options.md").read_text()
    assert all(f"`--{name.replace('_', '-')}`" in text for name in FIELDS)


def test_the_first_hour_can_be_had(tmp_path, monkeypatch, capfd):
    """Every command of the page is run, in its order; only the installation has been done before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, code in re.findall(r'^```python title="(\S+)"\n(.*?)^```', FIRST_HOUR, re.DOTALL | re.MULTILINE):
        Path(name).write_text(code, encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", FIRST_HOUR, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    assert lines[0] == "pip install ." and len(lines) > 12
    said = {}
    for line in lines[1:]:
        program, *arguments = shlex.split(line)
        if program == "python":
            subprocess.run([sys.executable, *arguments], check=True)
            continue
        assert program == "rwkv-es"
        assert cli.main(arguments) == 0, (line, capfd.readouterr().err[-2000:])
        said[line] = capfd.readouterr().out
    trained = next(text for line, text in said.items() if " train " in line)
    before, *_, after = (float(found) for found in re.findall(r"accuracy ([\d.]+)%", trained))
    assert before <= 20 and after >= 80, "as the page promises"
    assert next(text for line, text in said.items() if "generate" in line).strip().startswith("56")
    assert not list(Path("runs/products/snapshots").glob("step-*/model.pth"))[1:], "cleaned"
