"""The port's version, and the release that it is made for."""

import tomllib

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from rgexport.kernels.llama_cpp import port
from tests.command_line import ROOT


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
