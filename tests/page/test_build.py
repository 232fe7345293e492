"""The build of the chat page: the same sources give the same bytes."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from rgexport.page import build

_UNREACHABLE = re.compile("not installed|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT")
"""Marks of a machine without npm, or without a way to its registry."""


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    return json.loads((build.SOURCES / "package-lock.json").read_text())


def test_the_lockfile_names_no_host(lock: dict[str, Any]) -> None:
    assert "://" not in json.dumps(lock)


def test_the_lockfile_has_the_hash_of_every_package(lock: dict[str, Any]) -> None:
    packages = {path: entry for path, entry in lock["packages"].items() if "node_modules/" in path}
    assert len(packages) > 10
    for path, entry in packages.items():
        assert entry.get("link") or entry["integrity"].startswith("sha512-"), path


def test_the_lockfile_is_of_these_requirements(lock: dict[str, Any]) -> None:
    package = json.loads((build.SOURCES / "package.json").read_text())
    for kind in ("dependencies", "devDependencies"):
        assert lock["packages"][""][kind] == package[kind]


def test_an_archive_depends_on_names_and_bytes_alone(tmp_path: Path) -> None:
    names = ["index.html", "assets/a.js", "assets-b.js"]
    archives = []
    for folder, order in ((tmp_path / "one", names), (tmp_path / "two", names[::-1])):
        for number, name in enumerate(order):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name * 100)
            path.chmod(0o600 if folder.name == "one" else 0o644)
            os.utime(path, (number * 10**6, number * 10**6))
        build._pack(folder, tmp_path / f"{folder.name}.zip")
        archives.append((tmp_path / f"{folder.name}.zip").read_bytes())
    assert archives[0] == archives[1]


@pytest.mark.full
def test_two_builds_are_equal(tmp_path: Path) -> None:
    """They install into different folders, from nothing."""
    archives = []
    skip = shutil.ignore_patterns("node_modules", "dist")
    for clone in (tmp_path / "one", tmp_path / "two" / "deeper"):
        shutil.copytree(build.SOURCES, clone / "page", ignore=skip)
        shutil.copytree(build.LIBRARY, clone / "rgexport" / "web")
        try:
            archive = build.build(clone / "page.zip", clone / "page")
        except build.BuildFailed as failed:
            if not _UNREACHABLE.search(str(failed)):
                raise
            pytest.skip(f"packages cannot be installed: {str(failed)[:200]}")
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]


def test_an_outdated_lockfile_is_refused(tmp_path: Path) -> None:
    """The reason is shown, not npm's explanation of its options."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    clone = tmp_path / "page"
    skip = shutil.ignore_patterns("node_modules", "dist")
    shutil.copytree(build.SOURCES, clone, ignore=skip)
    shutil.copytree(build.LIBRARY, tmp_path / "rgexport" / "web")
    package = json.loads((clone / "package.json").read_text())
    package["dependencies"]["idb"] = "^7.0.0"
    (clone / "package.json").write_text(json.dumps(package))
    with pytest.raises(build.BuildFailed, match=r"(?s)npm ci failed:.*in sync"):
        build.build(tmp_path / "page.zip", clone)
    assert not (tmp_path / "page.zip").exists()
