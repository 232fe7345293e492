"""The llama.cpp that the port is made for, as its archive has it."""

from pathlib import Path

import pytest

from rgexport.kernels.llama_cpp import build, port
from tests.llama_tools import FOLDER

ARCHIVE = FOLDER.parent / build.ARCHIVE


@pytest.fixture(scope="session")
def archive() -> Path:
    if not ARCHIVE.is_file():
        pytest.skip("the source of llama-cpp-python is not there: make llama")
    return ARCHIVE


@pytest.fixture(scope="session")
def originals(archive: Path) -> dict[str, str]:
    """What the port changes, and what tells a llama.cpp checkout."""
    return build.read_files(archive, [*port.registration(), "include/llama.h"])


@pytest.fixture
def checkout(originals: dict[str, str], tmp_path: Path) -> Path:
    folder = tmp_path / "llama.cpp"
    for path, text in originals.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, "utf-8", newline="")
    return folder
