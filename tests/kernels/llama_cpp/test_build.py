"""The build: its source and its steps, and its results where it has run."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.kernels.llama_cpp import port, sources
from rgexport.kernels.llama_cpp.build import TOOLS
from rgexport.kernels.llama_cpp.command import Commands
from tests.command_line import rgexport
from tests.llama_tools import installed_version, needs_llama_cpp, run_tool


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_commands_follow_each_other_in_one_log(tmp_path, capsys):
    commands = Commands(tmp_path / "log", {"WORD": "inside"})
    commands.run(python("import os; print(os.environ['WORD'])"), "it")
    commands.run(python("print('[1/2] one'); print('[2/2] two')"), "it", "Building")
    first, said, _, *steps = (tmp_path / "log").read_text().splitlines()
    assert first.startswith("$ ") and said == "inside" and steps == ["[1/2] one", "[2/2] two"]
    assert capsys.readouterr().err.startswith("Building: 2 steps")


def test_a_command_that_fails_says_why_and_where(tmp_path):
    program = "print('fine'); print('x.cpp:3: error: no such thing'); print('error: 1'); exit(3)"
    with pytest.raises(RequestError) as error:
        Commands(tmp_path / "log", {}).run(python(program), "the compiler", "Building")
    assert str(error.value) == (
        f"the compiler failed: error: no such thing (its output is in {tmp_path / 'log'})"
    )
    program = "print('CMake Error at here (project):'); print(); print('  No compiler.'); exit(1)"
    with pytest.raises(RequestError, match=r"cmake failed: Error at here .*: No compiler. \("):
        Commands(tmp_path / "log", {}).run(python(program), "cmake")
    with pytest.raises(RequestError, match="no-such-program is not installed"):
        Commands(tmp_path / "log", {}).run(["no-such-program"], "it")


def test_a_build_without_an_index_ends_in_one_line(tmp_path):
    asked = "llama-cpp", "build", "-o", "made"
    done = rgexport(
        *asked, folder=tmp_path, environment={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: pip failed: ERROR: ")
    assert str(tmp_path / "made" / "build.log") in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "made").glob("*.whl")) and not (tmp_path / "made/bin").exists()


def test_one_build_at_a_time(tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert run(["llama-cpp", "build", "-o", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"Error: another build is running in {tmp_path}; wait for it\n"
    )


def test_an_archive_is_downloaded_unless_it_is_there(archive, tmp_path):
    asked = []

    def pip(*arguments: str) -> None:
        asked.append(Path(arguments[arguments.index("-r") + 1]).read_text())

    (tmp_path / sources.ARCHIVE).write_bytes(b"cut off")
    with pytest.raises(RequestError, match=f"pip gave no {sources.ARCHIVE}"):
        sources.fetch(tmp_path, pip)
    assert [path.name for path in tmp_path.iterdir()] == [sources.ARCHIVE]
    assert asked == [f"llama-cpp-python=={port.RELEASE} --hash=sha256:{port.SHA256}\n"]
    assert sources.fetch(archive.parent, pip) == archive and len(asked) == 1


def test_a_later_port_rewrites_only_what_it_changes(archive, tmp_path, monkeypatch):
    tree, cpp = tmp_path / "tree", tmp_path / "recurrentgemma.cpp"
    sources.unpack(archive, tree)
    assert not list(tree.rglob(".git")) and (tree / "vendor/llama.cpp/CMakeLists.txt").is_file()
    sources.apply_port(archive, tree)
    touched = [tree / sources.LLAMA_CPP / path for path in [*port.registration(), port.MODEL_FILE]]
    before = {path: path.stat().st_mtime_ns for path in touched}

    cpp.write_text(port.model_source() + "// changed\n")
    monkeypatch.setattr(port, "_MODEL", cpp)
    sources.unpack(archive, tree)
    sources.apply_port(archive, tree)
    changed = [path for path in touched if path.stat().st_mtime_ns != before[path]]
    assert changed == [tree / sources.LLAMA_CPP / port.MODEL_FILE]
    assert changed[0].read_text() == cpp.read_text()


@needs_llama_cpp
def test_what_was_built_and_installed_is_the_port(archive):
    tree = archive.parent / f"src-{port.RELEASE}"
    built = tree / sources.LLAMA_CPP / port.MODEL_FILE
    assert built.read_text("utf-8") == port.model_source()
    assert installed_version() == port.port_version()
    (wheel,) = archive.parent.glob(f"llama_cpp_python-{port.port_version()}-*.whl")
    with zipfile.ZipFile(wheel) as files:
        libraries = {n.removeprefix("llama_cpp/lib/") for n in files.namelist() if "/lib/" in n}
        assert b"\0recurrentgemma\0" in files.read("llama_cpp/lib/libllama.so")
    assert libraries >= {f"lib{n}.so" for n in ("llama", "ggml", "ggml-base", "ggml-cpu")}
    assert not any("common" in name for name in libraries)


@pytest.mark.parametrize("name", TOOLS)
def test_the_tools_run_from_their_folder(llama_tools, tmp_path, name):
    asked = [str(llama_tools / name), "--help"]  # after which some exit with 1
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "usage" in (done.stdout + done.stderr).lower(), done
    if name == "llama-bench":
        assert f"commit {port.COMMIT[:7]})" in run_tool(llama_tools / name, "--version")
