"""All functions under the address and undefined-behaviour sanitizers, on every set here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rgexport.kernels.build import build
from rgexport.kernels.rounding import library
from tests.built import COMPILER, built
from tests.command_line import ROOT

FOLDER = library.LIBRARY.parent
CPU = FOLDER.parent / "onnx" / "src"
SOURCES = [
    *sorted((FOLDER / "src").iterdir()),
    *(FOLDER / "CMakeLists.txt", CPU / "cpu.cpp", CPU / "cpu.h"),
]
PROGRAM = """
import sys
from pathlib import Path
from rgexport.kernels.rounding import library
library.LIBRARY = Path(sys.argv[1])
from tests.kernels.rounding.test_rounding import everything
print(len(everything()))
"""


def sanitized() -> Path:
    folder = built(_sanitized_rounding, SOURCES)
    return folder / library.LIBRARY.name


def _sanitized_rounding(folder: Path) -> None:
    build(FOLDER, folder, folder / "build", "-DSANITIZE=address,undefined")


def runtime() -> str:
    """The address sanitizer's own library: Python is not built with it, so it is loaded first."""
    asked = [COMPILER, "-print-file-name=libasan.so"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is loaded as on Linux")
@pytest.mark.parametrize("cpu", ["scalar", "avx2", "avx512"])
def test_clean(cpu: str) -> None:
    options = {"LD_PRELOAD": runtime(), "ASAN_OPTIONS": "detect_leaks=0", "RGEXPORT_CPU": cpu}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(sanitized())],
        env=os.environ | options,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "6\n"
