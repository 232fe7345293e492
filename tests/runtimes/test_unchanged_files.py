"""A file that changes under an open session is noticed before the next conversation."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rgexport.cli import run
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.opening import open_artifact
from rgexport.runtimes.engine import open_session
from tests.llama_tools import needs_llama_cpp

TOKENS = np.arange(2, 30)[None]
WEIGHTS = {
    "onnx": "model.onnx.data",
    "coreml": "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    "gguf": "",
}
"""Kind of artifact → the file in it that sessions map."""


def _written_to(path: Path) -> None:
    """In place, to the same size, as a download that goes on does it."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\0" * 8)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # clocks of files may be slow


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _replaced(path: Path) -> None:
    beside = path.with_suffix(".new")
    shutil.copy2(path, beside)
    beside.replace(path)


CHANGES = {"written to": _written_to, "cut": _cut, "replaced": _replaced, "removed": Path.unlink}


@pytest.fixture(
    scope="module", params=["onnx", "coreml", pytest.param("gguf", marks=needs_llama_cpp)]
)
def exported(request, tmp_path_factory) -> Path:
    kind = request.param
    target = tmp_path_factory.mktemp(kind) / ("demo.gguf" if kind == "gguf" else "demo")
    assert run([kind, "--size", "demo", "--int8", "--no-check", "-o", str(target)]) == 0
    return target


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Artifact:
    """One that may be spoilt."""
    here = tmp_path / exported.name
    (shutil.copytree if exported.is_dir() else shutil.copy2)(exported, here)
    return open_artifact(here)


@pytest.mark.parametrize("change", CHANGES)
def test_noticed_at_a_reset_and_when_a_session_opens(artifact, change):
    session = open_session(artifact)
    session.prefill(TOKENS)
    session.reset()
    path = artifact.path / WEIGHTS[artifact.manifest.kind]
    CHANGES[change](path)
    with pytest.raises(RequestError, match=f"^{path} changed while it was open; open .* again$"):
        session.reset()
    session.close()
    if change == "cut":
        with pytest.raises(RequestError, match=f"{path} changed while it was open"):
            open_session(artifact)


@pytest.mark.parametrize("exported", ["onnx", "coreml"], indirect=True)
def test_other_files_of_a_folder_may_change(artifact):
    """They were read when the artifact was opened."""
    session = open_session(artifact)
    (artifact.path / "README.md").write_text("another card")
    session.reset()
    session.close()
