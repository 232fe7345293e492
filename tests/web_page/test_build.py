"""The build of the page."""

import json
import re
import shutil
from zipfile import ZipFile

import pytest

from rgexport.web_page import build

pytestmark = pytest.mark.full

UNREACHABLE = re.compile("not installed|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT")
"""Marks of a machine without npm, or without a way to its registry."""


def test_two_builds_are_equal(tmp_path):
    """They install into different folders, from nothing; an outdated lockfile is refused."""
    archives, skipped = [], shutil.ignore_patterns("node_modules", "dist")
    for clone in (tmp_path / "one", tmp_path / "two" / "deeper"):
        shutil.copytree(build.SOURCES, clone / "page", ignore=skipped)
        shutil.copytree(build.LIBRARY, clone / "rgexport" / "npm")
        try:
            archive = build.build(clone / "page.zip", clone / "page")
        except build.BuildFailed as failed:
            if not UNREACHABLE.search(str(failed)):
                raise
            pytest.skip(f"packages cannot be installed: {str(failed)[:200]}")
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]
    with ZipFile(clone / "page.zip") as page:
        html = page.read("index.html").decode()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", html), "it names another host"
    assert "default-src 'self'" in html
    package = json.loads((clone / "page" / "package.json").read_text())
    package["dependencies"]["idb"] = "^7.0.0"
    (clone / "page" / "package.json").write_text(json.dumps(package))
    with pytest.raises(build.BuildFailed, match=r"(?s)npm ci .*failed:.*in sync"):
        build.build(clone / "new.zip", clone / "page")
    assert not (clone / "new.zip").exists()
