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
    identity = "-c", "user.name=A", "-c", "user.email=a@example.org"
    completed = run(folder, "git", *identity, *arguments)
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


def refusal(clone: Path, version: str) -> str:
    tags = git(clone, "tag")
    completed = release(clone, version)
    assert completed.returncode
    assert git(clone, "tag") == tags
    return completed.stderr


def test_a_release_is_an_annotated_tag_after_the_checks(clone: Path) -> None:
    completed = release(clone, "0.2.0")
    assert completed.returncode == 0, completed.stderr
    assert git(clone, "cat-file", "-t", "v0.2.0") == "tag"
    assert git(clone, "rev-parse", "v0.2.0^{commit}") == git(clone, "rev-parse", "HEAD")
    assert (clone / ".git" / "recipes").read_text().split() == ["lint", "test"]
    assert "git push origin v0.2.0" in completed.stdout


def test_the_notes_are_the_part_of_one_version(clone: Path) -> None:
    notes = run(clone, ".ci/release-notes", "0.2.0").stdout
    assert "The second thing." in notes
    assert "The first thing." not in notes


@pytest.mark.parametrize("version", ["", "1", "0.2.0rc1", "v0.2.0", "0.2.0 "])
def test_other_versions_are_refused(clone: Path, version: str) -> None:
    assert "expected one such as 0.1.0" in refusal(clone, version)


def test_a_version_without_notes_is_refused(clone: Path) -> None:
    assert 'no heading "## 0.3.0 (date)"' in refusal(clone, "0.3.0")


def test_a_heading_without_a_date_is_refused(clone: Path) -> None:
    commit(clone, **{"CHANGELOG.md": CHANGELOG.replace("2026-12-01", "unreleased")})
    assert '"## 0.2.0 (unreleased)", expected "## 0.2.0 (20' in refusal(clone, "0.2.0")


def test_a_second_tag_is_refused(clone: Path) -> None:
    git(clone, "tag", "v0.2.0")
    assert "the tag v0.2.0 exists" in refusal(clone, "0.2.0")


def test_uncommitted_files_are_refused(clone: Path) -> None:
    (clone / "new.txt").write_text("")
    assert "the tree has changes" in refusal(clone, "0.2.0")


def test_failing_checks_leave_no_tag(clone: Path) -> None:
    makefile = (clone / "Makefile").read_text()
    commit(clone, Makefile=makefile.replace("@echo $@", "@false && echo $@"))
    refusal(clone, "0.2.0")
    assert not (clone / ".git" / "recipes").exists()


def test_checks_that_change_files_leave_no_tag(clone: Path) -> None:
    makefile = (clone / "Makefile").read_text()
    commit(clone, Makefile=makefile.replace("@echo $@", "@touch left.txt; echo $@"))
    assert "the tree has changes" in refusal(clone, "0.2.0")
