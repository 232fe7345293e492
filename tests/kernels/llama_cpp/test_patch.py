"""Patching a checkout: all of it or nothing."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.kernels.llama_cpp import port
from rgexport.kernels.llama_cpp.patch import patch_checkout

PATCHED = [*port.registration(), port.MODEL_FILE]
PATCH = Path(port.__file__).with_name("registration.patch")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(folder: Path) -> str:
    """The message of a refusal; checks that no file has changed."""
    before = contents(folder)
    with pytest.raises(RequestError) as error:
        patch_checkout(folder)
    assert contents(folder) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_bytes().decode()
    assert old in text
    file.write_bytes(text.replace(old, new, 1).encode())


def test_patches_and_then_says_that_it_has(checkout, capsys):
    before = contents(checkout)
    assert run(["llama-cpp", "patch", str(checkout)]) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert files == [str(checkout / path) for path in PATCHED]
    assert last.startswith(f"{checkout} is patched. ")
    after = contents(checkout)
    assert {path for path in after if after[path] != before.get(path)} == set(PATCHED)
    assert after[port.MODEL_FILE].decode() == port.model_source()

    times = {path: (checkout / path).stat().st_mtime_ns for path in after}
    assert run(["llama-cpp", "patch", str(checkout)]) == 0
    assert capsys.readouterr().out.startswith(f"{checkout} is patched already")
    assert {path: (checkout / path).stat().st_mtime_ns for path in contents(checkout)} == times


@pytest.mark.skipif(not shutil.which("git"), reason="git is not there to compare with")
def test_does_what_git_does(checkout, tmp_path, monkeypatch):
    theirs = shutil.copytree(checkout, tmp_path / "theirs")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    subprocess.run(["git", "apply", str(PATCH)], cwd=theirs, check=True)
    patch_checkout(checkout)
    (checkout / port.MODEL_FILE).unlink()
    assert contents(checkout) == contents(theirs)


@pytest.mark.parametrize("path", port.registration())
def test_drift_names_the_file(checkout, path, capsys):
    context = port.registration()[path][-1].before
    edit(checkout / path, context, "\nsomething else\n")
    said = refused(checkout)
    assert str(checkout / path) in said and port.COMMIT[:7] in said and port.RELEASE in said
    assert run(["llama-cpp", "patch", str(checkout)]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"Error: {said}"] and not printed.out


def test_a_tree_that_was_half_patched_is_completed(checkout):
    patch_checkout(checkout)
    whole = contents(checkout)
    (checkout / port.MODEL_FILE).unlink()
    assert patch_checkout(checkout) == [port.MODEL_FILE]
    assert contents(checkout) == whole


def test_other_files_than_the_patch_knows_are_left_alone(checkout):
    models = checkout / "src/models/models.h"
    text = models.read_bytes()
    models.unlink()
    assert f"{models} is missing" in refused(checkout)
    models.write_bytes(text)
    (checkout / port.MODEL_FILE).write_text("// somebody else's\n")
    assert f"{checkout / port.MODEL_FILE} is there and differs" in refused(checkout)
    (checkout / port.MODEL_FILE).unlink()
    patch_checkout(checkout)
    edit(checkout / "src/llama-arch.cpp", "    { LLM_ARCH_RECURRENTGEMMA,", "    { LLM_ARCH_OTHER,")
    assert f"{checkout}/src/llama-arch.cpp has drifted" in refused(checkout)


def test_a_folder_that_is_no_llama_cpp(tmp_path, checkout):
    assert f"{tmp_path} is no llama.cpp: it has no include/llama.h" in refused(tmp_path)
    vendor = tmp_path / "bindings" / "vendor"
    vendor.mkdir(parents=True)
    checkout.rename(vendor / "llama.cpp")
    assert refused(tmp_path / "bindings").endswith(f"pass {vendor / 'llama.cpp'}")


@pytest.mark.parametrize("failing", range(2 * len(PATCHED)))
def test_a_write_that_fails_changes_nothing(checkout, failing, monkeypatch):
    before, calls = contents(checkout), []

    def counted(method):
        def call(self: Path, argument):
            calls.append(self)
            if len(calls) == failing + 1:
                raise OSError(28, "No space left on device", str(self))
            return method(self, argument)

        return call

    with monkeypatch.context() as patch:
        for name in "write_bytes", "replace":
            patch.setattr(Path, name, counted(getattr(Path, name)))
        with pytest.raises(OSError, match="No space left"):
            patch_checkout(checkout)
    assert contents(checkout) == before
