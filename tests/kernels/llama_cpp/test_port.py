"""Patching a checkout, all of it or nothing; the port's version; building a wheel."""

import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from itertools import count
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.version import Version

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.kernels.llama_cpp import build, port
from rgexport.kernels.llama_cpp.port import patch_checkout
from tests.command_line import ROOT, rgexport
from tests.llama_tools import installed_version, needs_llama_cpp

PATCHED = [*port.registration(), port.MODEL_FILE]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(folder: Path) -> str:
    """The message of a refusal; checks that no file has changed."""
    before = contents(folder)
    with pytest.raises(RequestError) as error:
        patch_checkout(folder)
    assert contents(folder) == before and "\n" not in str(error.value)
    return str(error.value)


def test_patches_and_then_says_that_it_has(checkout, capsys):
    before = contents(checkout)
    assert run(["llama-cpp", "patch", str(checkout)]) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert files == [str(checkout / path) for path in PATCHED]
    assert last.startswith(f"{checkout} is patched. ")
    after = contents(checkout)
    assert {path for path in after if after[path] != before.get(path)} == set(PATCHED)
    assert run(["llama-cpp", "patch", str(checkout)]) == 0
    assert capsys.readouterr().out.startswith(f"{checkout} is patched already")
    assert contents(checkout) == after


@pytest.mark.skipif(not shutil.which("git"), reason="git is not there to compare with")
def test_does_what_git_does(checkout, tmp_path, monkeypatch):
    theirs = shutil.copytree(checkout, tmp_path / "theirs")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    patch = Path(port.__file__).with_name("registration.patch")
    subprocess.run(["git", "apply", str(patch)], cwd=theirs, check=True)
    patch_checkout(checkout)
    assert (checkout / port.MODEL_FILE).read_text() == port.model_source()
    (checkout / port.MODEL_FILE).unlink()
    assert contents(checkout) == contents(theirs)
    # A tree that was half patched is completed.
    assert patch_checkout(checkout) == [port.MODEL_FILE]


def test_drift_names_the_file(checkout, capsys):
    for path, hunks in port.registration().items():
        text = (checkout / path).read_bytes()
        assert hunks[-1].before in text.decode()
        (checkout / path).write_text(text.decode().replace(hunks[-1].before, "\nsomething else\n"))
        said = refused(checkout)
        assert str(checkout / path) in said and port.COMMIT[:7] in said and port.RELEASE in said
        (checkout / path).write_bytes(text)
    (checkout / port.MODEL_FILE).write_text("// somebody else's\n")
    assert f"{checkout / port.MODEL_FILE} is there and differs" in refused(checkout)
    (checkout / path).unlink()
    assert run(["llama-cpp", "patch", str(checkout)]) == 2
    assert capsys.readouterr().err == f"Error: {refused(checkout)}\n"


@pytest.mark.parametrize("failing", range(2 * len(PATCHED)))
def test_a_write_that_fails_changes_nothing(checkout, failing, monkeypatch):
    before, calls = contents(checkout), count()

    def once_without_space(method):
        def call(path, argument):
            if next(calls) == failing:
                raise OSError(28, "No space left on device", str(path))
            return method(path, argument)

        return call

    for owner, name in (Path, "write_bytes"), (os, "replace"):
        monkeypatch.setattr(owner, name, once_without_space(getattr(owner, name)))
    with pytest.raises(OSError, match="No space left"):
        patch_checkout(checkout)
    assert contents(checkout) == before


def test_the_version_is_of_the_release_that_the_extra_asks_for():
    assert re.fullmatch(r"\d+\.\d+\.\d+\+rgexport\.g[0-9a-f]{8}", port.port_version())
    version = Version(port.port_version())
    assert version.base_version == port.RELEASE and version > Version(port.RELEASE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"llama-cpp-python=={port.RELEASE}" in project["optional-dependencies"]["gguf"]


def test_a_build_without_an_index_ends_in_one_line(tmp_path):
    asked = "llama-cpp", "build", "-o", "made"
    without_index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = rgexport(*asked, folder=tmp_path, environment=without_index)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: pip failed: ERROR: ")
    assert str(tmp_path / "made" / "build.log") in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "made").glob("*.whl")) and not (tmp_path / "made/bin").exists()
    with FileLock(tmp_path / "made" / ".lock"):
        done = rgexport(*asked, folder=tmp_path)
    assert done.stderr == "Error: another build is running in made; wait for it\n"


def test_an_archive_is_downloaded_unless_it_is_there(archive, tmp_path):
    asked = []

    def pip(*arguments: str) -> None:
        asked.append(Path(arguments[arguments.index("-r") + 1]).read_text())

    (tmp_path / build.ARCHIVE).write_bytes(b"cut off")
    with pytest.raises(RequestError, match=f"pip gave no {build.ARCHIVE}"):
        build.fetch(tmp_path, pip)
    assert [path.name for path in tmp_path.iterdir()] == [build.ARCHIVE]
    assert asked == [f"llama-cpp-python=={port.RELEASE} --hash=sha256:{port.SHA256}\n"]
    assert build.fetch(archive.parent, pip) == archive and len(asked) == 1


@needs_llama_cpp
def test_what_was_built_and_installed_is_the_port(archive):
    built = archive.parent / f"src-{port.RELEASE}" / build.LLAMA_CPP / port.MODEL_FILE
    assert built.read_text("utf-8") == port.model_source()
    assert installed_version() == port.port_version()
    (wheel,) = archive.parent.glob(f"llama_cpp_python-{port.port_version()}-*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert b"\0recurrentgemma\0" in files.read("llama_cpp/lib/libllama.so")
