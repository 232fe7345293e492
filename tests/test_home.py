"""Nothing is written to the user's home but what the README names."""

import subprocess
import sys
from pathlib import Path

import pytest

from rgexport.cli import run
from tests.command_line import ROOT, START, rgexport
from tests.llama_tools import needs_llama_cpp

NAMED = {Path(".cache/rgexport/verified.json")}
KINDS = [
    "onnx",
    pytest.param("coreml", marks=pytest.mark.full),
    pytest.param("gguf", marks=needs_llama_cpp),
]


def written(home: Path) -> set[Path]:
    return {path.relative_to(home) for path in home.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("kind", KINDS)
def test_generate_leaves_an_empty_home_empty(kind, tmp_path):
    target = tmp_path / ("demo.gguf" if kind == "gguf" else "demo")
    assert run([kind, "--size", "demo", "--int8", "--no-check", "-o", str(target)]) == 0
    home = tmp_path / "home"
    home.mkdir()
    # Empty values count as none.
    names = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")
    home_is = dict.fromkeys((*names, "RGEXPORT_CACHE"), "")
    home_is |= {"HOME": str(home), "USERPROFILE": str(home)}
    done = rgexport("generate", target, "-p", "A", "-n", "2", folder=tmp_path, environment=home_is)
    assert done.returncode == 0, done.stderr
    assert written(home) <= NAMED
    inside = home_is | {"RGEXPORT_CACHE": str(tmp_path / "cache")}
    (home / ".cache/rgexport/verified.json").unlink()
    done = rgexport("generate", target, "-p", "A", "-n", "2", folder=tmp_path, environment=inside)
    assert done.returncode == 0 and written(home) == set()
    assert (tmp_path / "cache" / "verified.json").is_file()


def test_telemetry_is_off_whatever_is_imported_first():
    """Of each module that imports ONNX Runtime or huggingface_hub, as of the command line."""
    sources = [
        path
        for path in (ROOT / "rgexport").rglob("*.py")
        if any(f"import {name}" in path.read_text("utf-8") for name in ("onnxruntime", "snapshot"))
    ]
    assert len(sources) >= 3
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources]
    for start in (START.split(";")[0], *(f"import {name}" for name in names)):
        variables = "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"
        look = f"{start}; import os; print(*map(os.environ.get, {variables}))"
        command = [sys.executable, "-c", look]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert told.stdout == "1 1\n"
