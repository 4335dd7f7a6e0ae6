"""What contributors and releases rely on: one version, one entry for checks, a whole source distribution."""

import re
import subprocess
import sys
import tarfile

import pytest
import yaml
from places import ROOT

from rwkv_es import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GITHUB = ROOT / ".github"
IS_CHECKOUT = (ROOT / ".git").exists()


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def workflow(name):
    """Return a workflow's triggers and jobs; YAML 1.1 reads the key `on` as true."""
    values = read_yaml(GITHUB / "workflows" / name)
    return values[True], values["jobs"]


def test_the_version_stands_in_one_place_and_the_citation_agrees():
    assert PYPROJECT["project"]["dynamic"] == ["version"] and "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "rwkv_es/__init__.py"
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all(author.get("family-names") or author.get("name") for author in citation["authors"])


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A tree whose version, citation and changelog agree on 1.2.0."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    (tmp_path / "rwkv_es").mkdir()
    (tmp_path / "rwkv_es" / "__init__.py").write_text('"""A package."""\n\n__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2027-01-31\n")
    return tmp_path


def test_a_tag_is_released_only_as_the_version_that_all_files_name(release, capsys):
    from check_release import main

    assert main(release, "v1.2.0") == 0
    for file, wrong in (("CITATION.cff", "version: 1.1.0\n"), ("CHANGELOG.md", "## [Unreleased]\n\n## [1.2.01]\n")):
        whole = (release / file).read_text()
        (release / file).write_text(wrong)
        assert main(release, "v1.2.0") == 1 and file in capsys.readouterr().err
        (release / file).write_text(whole)
    for tag in ("v1.2.1", "1.2.0", "main"):
        assert main(release, tag) == 1 and tag in capsys.readouterr().err


def test_ci_calls_the_one_entry_on_every_python_that_the_package_allows():
    triggers, jobs = workflow("ci.yml")
    assert {"push", "pull_request", "workflow_call"} <= set(triggers)
    (job,) = jobs.values()
    pythons = job["strategy"]["matrix"]["python"]
    classified = re.findall(r"Python :: (3\.\d+)$", "\n".join(PYPROJECT["project"]["classifiers"]), re.MULTILINE)
    assert pythons == classified == ["3.10", "3.11", "3.12", "3.13"]
    assert PYPROJECT["project"]["requires-python"] == ">=3.10,<3.14"
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert job["env"]["PYTHON"] == "python", "scripts/setup_venv would choose an interpreter of its own"


def test_publishing_builds_both_forms_of_a_checked_tag_after_ci():
    triggers, jobs = workflow("publish.yml")
    assert triggers == {"push": {"tags": ["v*"]}}
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    commands = "\n".join(step.get("run", "") for step in jobs["build"]["steps"])
    assert 'scripts/check_release.py "$GITHUB_REF_NAME"' in commands and "python -m build" in commands
    assert set(jobs["publish"]["needs"]) == {"ci", "build"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}, "trusted publishing needs it, and nothing else"


def test_the_checks_are_listed_once_and_called_by_ci_and_by_the_hook():
    checks = (ROOT / "scripts" / "lint").read_text()
    for tool in ("ruff", "mypy", "lint-imports", "check_style.py"):
        assert tool in checks
        assert tool not in (ROOT / ".ci" / "run").read_text().replace("ruff, mypy", "")
    assert "\n./scripts/lint\n" in (ROOT / ".ci" / "run").read_text()
    (repository,) = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local" and [hook["entry"] for hook in repository["hooks"]] == ["scripts/lint"]
    for script in ("lint", "test", "demo"):
        assert (ROOT / "scripts" / script).stat().st_mode & 0o100


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_the_issue_forms_are_whole(name):
    form = read_yaml(GITHUB / "ISSUE_TEMPLATE" / name)
    assert form["name"] and form["description"]
    for field in form["body"]:
        assert field["type"] in ("textarea", "input") and field["attributes"]["label"]
    if name == "bug.yml":
        labels = " ".join(field["attributes"]["label"] for field in form["body"])
        assert "`rwkv-es --version`" in labels and "`rwkv-es doctor " in labels


def test_what_contributors_are_told_to_run_and_read_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:python |bash )?(\.?\w*[\w/.-]*/[\w/.-]*)", text)
    assert len(named) > 15
    for path in named:
        assert (ROOT / path).exists() or path.startswith(".venv"), path


def test_uv_installs_what_pip_does():
    def pins(lines):
        return {re.sub(r"\s*;\s*", ";", line.partition("#")[0].strip()).replace('"', "'") for line in lines} - {""}

    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert pins(PYPROJECT["tool"]["uv"]["constraint-dependencies"]) == pins(constraints)
    assert PYPROJECT["dependency-groups"]["dev"] == ["rwkv-es[dev]"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is newer")
def test_the_lock_file_is_of_this_project():
    import tomllib

    locked = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    versions = {}
    for package in locked["package"]:
        versions.setdefault(package["name"], []).append(package)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if pin := re.match(r"([\w-]+)==([^\s;]+)", line):
            assert pin[2] in {package["version"] for package in versions[pin[1].lower()]}, line
    (ours,) = versions["rwkv-es"]
    wanted = {re.match(r"[\w-]+", name)[0].lower() for name in PYPROJECT["project"]["dependencies"]}
    assert {dependency["name"] for dependency in ours["dependencies"]} == wanted
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(ours["optional-dependencies"]) == set(extras), "run: uv lock"
    assert {package["source"].get("registry", "https://pypi.org/simple") for package in locked["package"]} == {
        "https://pypi.org/simple"
    }


@pytest.mark.skipif(not IS_CHECKOUT, reason="compares with the files that git knows")
def test_the_source_distribution_is_all_that_git_knows_and_the_wheel_is_typed(tmp_path):
    for target in ("sdist", "wheel"):
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", tmp_path], cwd=ROOT, check=True, text=True
        )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(listed.splitlines()) - packed == set()
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"rwkv_es-{__version__}-")
    assert "rwkv_es/py.typed" in zipfile.ZipFile(wheel).namelist()
