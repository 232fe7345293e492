"""`make release`: what it refuses, and the tag that it makes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_line import ROOT

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "git", "make"))), reason="needs bash, git and make"
)

CHANGELOG = """# Changelog

## 0.2.0 (2026-12-01)

### Added

- The second thing.

## 0.1.0 (2026-01-01)

- The first thing.
"""
RECIPES = "lint test:\n\t@echo $@ >> .git/recipes\n"
"""Stands for the checks, which take minutes."""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def git(folder: Path, *arguments: str) -> str:
    completed = run(folder, "git", *arguments)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


def commit(clone: Path, **files: str) -> None:
    for name, text in files.items():
        (clone / name).write_text(text)
    git(clone, "add", "--all")
    git(clone, "commit", "--quiet", "--message", "A change")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the real commands and target of a release, but with quick checks."""
    target = re.search(r"^release:.*\n(\t.*\n)+", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert target
    (tmp_path / ".ci").mkdir()
    for name in ("release", "release-notes"):
        shutil.copy(ROOT / ".ci" / name, tmp_path / ".ci")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.name", "A")
    git(tmp_path, "config", "user.email", "a@example.org")
    commit(tmp_path, Makefile=RECIPES + target[0], **{"CHANGELOG.md": CHANGELOG})
    return tmp_path


def release(clone: Path, version: str) -> subprocess.CompletedProcess[str]:
    return run(clone, "make", "release", f"VERSION={version}")


def test_a_release_is_an_annotated_tag_after_the_checks(clone: Path) -> None:
    (clone / "new.txt").touch()
    assert "the tree has changes" in release(clone, "0.2.0").stderr
    (clone / "new.txt").unlink()
    completed = release(clone, "0.2.0")
    assert completed.returncode == 0, completed.stderr
    assert git(clone, "cat-file", "-t", "v0.2.0") == "tag"
    assert git(clone, "rev-parse", "v0.2.0^{commit}") == git(clone, "rev-parse", "HEAD")
    assert (clone / ".git" / "recipes").read_text().split() == ["lint", "test"]
    assert "git push origin v0.2.0" in completed.stdout
    assert "the tag v0.2.0 exists" in release(clone, "0.2.0").stderr


def test_the_notes_are_the_part_of_one_version(clone: Path) -> None:
    notes = run(clone, ".ci/release-notes", "0.2.0").stdout
    assert "The second thing." in notes and "The first thing." not in notes


@pytest.mark.parametrize(
    ("version", "edit", "complaint"),
    [
        *(
            (version, {}, "expected one such as 0.1.0")
            for version in ("", "1", "0.2.0rc1", "v0.2.0")
        ),
        ("0.3.0", {}, 'no heading "## 0.3.0 (date)"'),
        ("0.2.0", {"## 0.2.0 (2026-12-01)": "## 0.2.0"}, 'expected "## 0.2.0 (20'),
        ("0.2.0", {"@echo $@": "@false && echo $@"}, ""),
        ("0.2.0", {"@echo $@": "@touch left.txt; echo $@"}, "the tree has changes"),
    ],
)
def test_what_is_refused_leaves_no_tag(clone: Path, version, edit, complaint) -> None:
    for old, new in edit.items():
        for name in ("CHANGELOG.md", "Makefile"):
            text = (clone / name).read_text()
            (clone / name).write_text(text.replace(old, new))
        commit(clone)
    completed = release(clone, version)
    assert completed.returncode and complaint in completed.stderr
    assert git(clone, "tag") == ""
