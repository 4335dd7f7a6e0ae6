"""Check that a tag may be released: python scripts/check_release.py v0.1.0 (a workflow does it for every tag)."""

import re
import sys
from pathlib import Path


def main(root: Path, tag: str) -> int:
    """Print what does not fit the tag. Returns the exit code."""
    faults = faults_of(root, tag)
    for fault in faults:
        print(f"release: {fault}", file=sys.stderr)
    return 1 if faults else 0


def faults_of(root: Path, tag: str) -> list[str]:
    """Return in which files something else stands than the tag's version."""
    version = version_of(root)
    faults = []
    if tag != f"v{version}":
        faults.append(f"the tag is {tag}, but rwkv_es/__init__.py says {version}; tag v{version}, or change it there")
    cited = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1] != version:
        faults.append(f"CITATION.cff says version {cited[1] if cited else '(none)'} instead of {version}")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes(root), re.MULTILINE):
        faults.append(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD'; give Unreleased that title")
    return faults


def version_of(root: Path) -> str:
    """Return the version, which stands in rwkv_es/__init__.py alone, without importing anything."""
    found = re.search(r'^__version__ = "(.+)"$', (root / "rwkv_es" / "__init__.py").read_text(encoding="utf-8"), re.M)
    assert found is not None
    return found[1]


def changes(root: Path) -> str:
    """Return the changelog."""
    return (root / "CHANGELOG.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("release: name the tag: python scripts/check_release.py v0.1.0")
    sys.exit(main(Path(__file__).resolve().parent.parent, sys.argv[1]))
