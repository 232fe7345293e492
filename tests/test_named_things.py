"""Pages for developers: the paths, modules, commands and names in them exist."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from rgexport.cli import rgexport as command_line
from tests.command_line import ROOT

PLACEHOLDERS = ("FORMAT", "ENGINE", "NAME")
"""Parts of paths in instructions, which stand for any name."""

SUFFIXES = "py|h|cpp|c|md|mjs|ts|js|json|yml|yaml|toml|txt|patch|cu"
"""Ends of file names. A word with a dot and another end is a name in code, such as `ops.linear`."""

WRITTEN_BY_COMMANDS = ("out", "build", ".venv", "model.mlpackage", "not-built.txt", "results.json")
"""Files and folders, not in the repository, that commands of the project write."""

OF_OTHER_PROJECTS = (
    "onnxruntime_c_api.h",
    "convert_hf_to_gguf.py",
    "packages/transformers/src",
    "AutoModel",
    "GATED_LINEAR_ATTN",
)
"""Paths and names of other projects that no patch in the repository has."""

CODE = (".py", ".h", ".cpp", ".c", ".cu", ".patch", ".toml", ".ts", ".mjs", ".js", ".txt", ".yml")
"""Ends of the names of files that are searched for identifiers."""


@cache
def tracked_paths() -> tuple[str, ...]:
    """Returns the paths of all files in the repository, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(path for path in listing.stdout.splitlines() if (ROOT / path).is_file())


def developer_pages() -> list[str]:
    """Returns the paths of CONTRIBUTING, docs/development and all READMEs but model cards."""
    pages = ["CONTRIBUTING.md"]
    for path in tracked_paths():
        is_readme = Path(path).name == "README.md" and path != "demo/model/README.md"
        is_development = path.startswith("docs/development/") and path.endswith(".md")
        if is_readme or is_development:
            pages.append(path)
    return pages


@cache
def known_paths() -> tuple[str, ...]:
    """Returns all files and folders of the repository, and those that its patches change."""
    files = list(tracked_paths())
    for path in tracked_paths():
        if path.endswith(".patch"):
            patch = (ROOT / path).read_text("utf-8")
            files += re.findall(r"^\+\+\+ b/(\S+)", patch, re.MULTILINE)

    paths = set(files)
    for file in files:
        folders = Path(file).parents
        paths.update(folder.as_posix() for folder in folders)
    return tuple(sorted(paths))


@cache
def source_words() -> frozenset[str]:
    """Returns all identifiers in the sources of the repository."""
    words: set[str] = set()
    for path in tracked_paths():
        if path.endswith(CODE):
            words.update(re.findall(r"\w+", (ROOT / path).read_text("utf-8")))
    return frozenset(words)


def without_blocks(page: str) -> str:
    """Returns the text of a page without its indented and fenced blocks."""
    text = (ROOT / page).read_text("utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", prose, flags=re.MULTILINE)


def quoted(page: str) -> list[str]:
    """Returns what stands between backticks on a page."""
    return re.findall(r"`([^`\n]+)`", without_blocks(page))


def quoted_paths(page: str) -> list[str]:
    """Returns the words between backticks that are paths: with a slash, or the end of a file.

    A word that starts with a slash is the path of a URL.
    """
    words = [word for phrase in quoted(page) for word in phrase.split()]
    file_name = re.compile(rf"(?!/)[\w.*/{{}},-]*\w\.({SUFFIXES}|{{h,cpp}})")
    paths = []
    for word in words:
        is_folder = re.fullmatch(r"[\w.-]+(/[\w.*{},-]+)*/", word) is not None
        has_slash = re.fullmatch(r"[\w.-]+(/[\w.*{},-]+)+", word) is not None
        if is_folder or has_slash or file_name.fullmatch(word):
            paths.append(word)
    return paths


def path_pattern(path: str) -> re.Pattern[str]:
    """Returns a pattern for the ends of paths that a path on a page stands for.

    `*` and the placeholders stand for any characters but slashes, `{h,cpp}` for one of its words.
    """
    pattern = re.escape(path.removeprefix("../").rstrip("/"))
    pattern = pattern.replace(r"\*", "[^/]*")
    pattern = re.sub(r"\\{(\w+),(\w+)\\}", r"(\1|\2)", pattern)
    for placeholder in PLACEHOLDERS:
        pattern = re.sub(rf"(?<![A-Z]){placeholder}(?![A-Z])", "[^/]+", pattern)
    return re.compile(f"(.*/)?{pattern}")


def path_exists(path: str) -> bool:
    """Tells whether any file or folder has this path, or a path that ends with it."""
    if path.split("/")[0] in WRITTEN_BY_COMMANDS or path in OF_OTHER_PROJECTS:
        return True
    pattern = path_pattern(path)
    return any(pattern.fullmatch(known) for known in known_paths())


@pytest.mark.parametrize("page", developer_pages())
def test_paths_exist(page):
    missing = [path for path in quoted_paths(page) if not path_exists(path)]

    assert not missing, f"{page} names {missing}"


@pytest.mark.parametrize("page", developer_pages())
def test_modules_exist(page):
    text = (ROOT / page).read_text("utf-8")
    modules = re.findall(r"python -m ((?:rgexport|bench|fuzz|demo)[\w.]*)", text)

    missing = []
    for module in modules:
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            missing.append(module)

    assert not missing, f"{page} names {missing}"


@pytest.mark.parametrize("page", developer_pages())
def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))

    named = set()
    text = (ROOT / page).read_text("utf-8")
    for command in re.findall(r"(?:^    |`)make ([a-z][a-z -]*)", text, re.MULTILINE):
        named.update(command.split())

    assert named <= targets, f"{page} names {sorted(named - targets)}"


@pytest.mark.parametrize("page", developer_pages())
def test_commands_exist(page):
    text = (ROOT / page).read_text("utf-8")
    named = set(re.findall(r"(?:^    |`)rgexport ([a-z][a-z-]*)", text, re.MULTILINE))

    missing = named - set(command_line.commands)

    assert not missing, f"{page} names {sorted(missing)}"


@pytest.mark.parametrize("page", developer_pages())
def test_identifiers_exist(page):
    identifier = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(\w*\))?")
    missing = []
    for phrase in quoted(page):
        is_name = identifier.fullmatch(phrase) and phrase not in quoted_paths(page)
        if not is_name or phrase in OF_OTHER_PROJECTS:
            continue
        words = re.findall(r"\w+", phrase)
        if not set(words) <= source_words():
            missing.append(phrase)

    assert not missing, f"{page} names {missing}"
