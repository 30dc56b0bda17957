"""What a reader may count on: files that one can read in a sitting, and pages whose lines fit a screen."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = {".py", ".cpp", ".h"}
MOST_LINES, MOST_COLUMNS = 400, 160


def tracked(*endings: str) -> list[str]:
    """Files of the tree by their ending; from git where there is a clone, else from the folders (an sdist has no .git)."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        names = [name for name in listed if name and (ROOT / name).is_file()]
    else:
        names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return sorted(name for name in names if Path(name).suffix in endings)


@pytest.mark.parametrize("name", tracked(*CODE))
def test_a_file_is_read_in_a_sitting(name: str) -> None:
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{name}: {lines} lines; two things live in it"


@pytest.mark.parametrize("name", tracked(".md"))
def test_a_page_fits_a_screen(name: str) -> None:
    long = [i for i, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1) if len(line) > MOST_COLUMNS]
    assert not long, f"{name}: lines over {MOST_COLUMNS} columns: {long}"


def test_contributing_names_what_exists() -> None:
    """Every file and folder in code quotes, whole or from a folder that the sentence is about; not what a user's own folder holds."""
    quoted = re.findall(r"`([^`\s*]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    endings = (*CODE, ".md", ".json", ".toml", ".txt")
    named = [x for x in quoted if x.endswith(endings) or "/" in x]
    files = tracked(*endings, "")
    there = {"/" + part for name in files for part in (name, *(p.as_posix() for p in Path(name).parents))}
    assert len(named) > 40, "the check reads nothing"
    assert not (missing := [x for x in named if not any(place.endswith("/" + x.strip("/")) for place in there)]), missing


def test_there_is_something_to_read() -> None:
    assert len(tracked(*CODE)) > 100 and "README.md" in tracked(".md")
