"""scripts/crash_points.py: a training that is killed at any point of its work on files ends as an undisturbed one does."""

import subprocess
import sys

import pytest
from places import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
def crash_points(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import crash_points

    return crash_points


def crash(*options):
    argv = [sys.executable, "scripts/crash_points.py", *options]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_some_points_are_survived():
    done = crash("--every", "37")
    assert done.returncode == 0, done.stdout + done.stderr
    tried, _, seen = done.stdout.splitlines()[-1].split()[:3]
    assert int(tried) >= 4 and int(seen) > 100
    assert done.stdout.endswith(" 0 failed\n")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--snapshot-every", "2"), ("--twice",)], ids=" ".join)
def test_all_points_are_survived(options):
    done = crash(*options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_differs_from_the_undisturbed_run_is_named(crash_points):
    good = crash_points.State(["a", "b"], [(0, 0.5), (1, None)], {"best.json": "x", "step-2/": "", "rest": "y"})
    assert crash_points.differences(good, good) == []
    bad = crash_points.State(
        ["a", "c"], [(0, 0.5)], {"best.json": "z", "rest": "y", ".partial-2/": "", "lock.json": "l"}
    )
    said = crash_points.differences(bad, good)
    assert said[0] == "left over: .partial-2/, lock.json"
    assert said[1:] == ["missing: step-2/", "other contents: best.json", "other weights", "other lines of metrics"]


def test_points_are_changes_below_the_folder_alone(crash_points, tmp_path):
    points = crash_points.Points(tmp_path / "run", 2)
    assert not points.reach("open", tmp_path / "run" / "a")
    assert not points.reach("open", tmp_path / "runs")
    assert points.reach("os.mkdir", str(tmp_path / "run" / "b" / ".." / "c").encode())
    assert points.seen == ["open a", "os.mkdir c"]
