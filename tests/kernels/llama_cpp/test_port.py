"""What the port says of itself, and of the llama.cpp that is installed."""

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from rgexport.kernels.llama_cpp import port
from tests.command_line import ROOT


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A `llama-cpp-python` that stands before any other: its library, to be filled."""
    (tmp_path / "llama_cpp" / "lib").mkdir(parents=True)
    (tmp_path / "llama_cpp" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    return tmp_path


def fill(package: Path, version: str, library: bytes) -> None:
    metadata = package / f"llama_cpp_python-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    (package / "llama_cpp" / "lib" / "libllama.so").write_bytes(library)


def test_the_version_tells_a_patched_build_and_its_port(tmp_path, monkeypatch):
    version = Version(port.port_version())
    assert str(version) == port.port_version() and version.base_version == port.RELEASE
    assert version in SpecifierSet(f"=={port.RELEASE}") and version > Version(port.RELEASE)

    changed = tmp_path / "recurrentgemma.cpp"
    changed.write_text(port.model_source() + "// changed\n")
    monkeypatch.setattr(port, "_MODEL", changed)
    assert port.port_version.__wrapped__() != str(version)


def test_the_extra_asks_for_the_release_of_the_port():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"llama-cpp-python=={port.RELEASE}" in project["optional-dependencies"]["gguf"]


@pytest.mark.parametrize(
    "version, library, runs, current",
    [
        (port.RELEASE, b"\0lfm2\0recurrentgemma2\0", False, False),
        ("0.9.0", b"\0lfm2\0recurrentgemma\0", True, False),
        (port.port_version(), b"\0lfm2\0recurrentgemma\0", True, True),
    ],
)
def test_tells_what_is_installed(package, version, library, runs, current):
    fill(package, version, library)
    found = port.installed()
    assert found == port.Installed(version, runs) and found.is_current == current
    assert str(found).startswith(f"llama-cpp-python {version} (with")


def test_nothing_installed(monkeypatch):
    monkeypatch.setattr(port, "DISTRIBUTION", "llama-cpp-python-that-nobody-has")
    assert port.installed() is None
