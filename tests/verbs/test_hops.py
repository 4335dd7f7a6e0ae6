"""The way from a verb to the arithmetic is short, and ARCHITECTURE.md names its stations."""

import itertools
import re
import traceback
from pathlib import Path

import pytest
from jobs import arguments
from places import ROOT

import rwkv_es
from rwkv_es.cli import main
from rwkv_es.model.weights import Weights

PACKAGE = Path(rwkv_es.__file__).parent


def stations(stack):
    """Return the package's files on a call stack, each once, from the verb on."""
    names = [Path(frame.filename) for frame in stack if frame.filename.startswith(str(PACKAGE))]
    files = list(dict.fromkeys(str(path.relative_to(PACKAGE)) for path in names))
    return files[files.index("verbs/train.py") :]


def test_one_step_takes_four_hops_which_are_written_down(tmp_path, monkeypatch):
    seen, linear = [], Weights.linear

    def noting(weights, x, name):
        if not seen and weights.factors is not None:
            seen.extend([*stations(traceback.extract_stack()[:-1]), "model/weights.py"])
        return linear(weights, x, name)

    monkeypatch.setattr(Weights, "linear", noting)
    assert main(arguments(tmp_path / "run", steps=1, eval_every=0, engine="torch")) == 0
    assert seen == ["verbs/train.py", "session.py", "engine/rollout.py", "model/forward.py", "model/weights.py"]
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    hops = re.findall(r"^\| \d \| `([\w/]+\.py)`.*?\| `([\w/]+\.py)`", text, flags=re.M)
    assert hops == list(itertools.pairwise(seen))


@pytest.mark.parametrize("wing", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_every_file_of_a_wing_is_named_there(wing):
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = re.search(rf"^\*\*{wing}/\*\*.*?(?=^\*\*\w+/\*\*|^At the top)", text, flags=re.M | re.S)
    assert section, f"{wing}/ has no paragraph"
    files = {path.name for path in (PACKAGE / wing).glob("*.py")} - {"__init__.py"}
    assert {name for name in files if f"`{name}`" not in section[0]} == set()
