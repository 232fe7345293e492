"""The loop in C that the documentation shows, against ONNX Runtime's own library."""

import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest

from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from tests.artifacts import export_random
from tests.command_line import ROOT, rgexport
from tests.models import ODD_CONFIGS

SOURCE = ROOT / "docs" / "examples" / "loop.c"
HEADERS = Path("/usr/include/onnxruntime")
COMPILER = shutil.which("cc")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not COMPILER, reason="not installed: cc"),
    pytest.mark.skipif(
        not (HEADERS / "onnxruntime_c_api.h").is_file(),
        reason="not installed: ONNX Runtime's headers, such as Debian's libonnxruntime-dev",
    ),
]


@pytest.fixture(scope="module")
def loop(tmp_path_factory) -> Path:
    """The program, with the library of the Python package."""
    folder = tmp_path_factory.mktemp("loop")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    flags = "-std=c11 -Wall -Wextra -Werror -O1 -fsanitize=undefined -lonnxruntime".split()
    place = [f"-I{HEADERS}", f"-L{folder}", f"-Wl,-rpath,{folder}", "-o", folder / "loop"]
    subprocess.run([COMPILER, SOURCE, *flags, *place], check=True, capture_output=True)
    return folder / "loop"


def check(loop: Path, artifact: Path) -> None:
    ids = [2, 51, 60]
    command = [loop, artifact / "model.onnx", "40", *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    asked = ["--ids", ",".join(map(str, ids)), "-n", "40", "--no-native"]
    expected = rgexport("generate", artifact, *asked, folder=artifact)
    assert done.stdout.split() == expected.stdout.split() and len(done.stdout.split()) == 40


@pytest.mark.parametrize("precision", ["int4", "fp16", "fp32"])
def test_tokens_of_the_demo(loop: Path, precision: str, tmp_path: Path) -> None:
    options = OnnxOptions(precision=precision)
    check(loop, export_onnx(open_checkpoint(size="demo"), options, tmp_path / "demo"))


@pytest.mark.parametrize("name", ["irregular", "hawk", "attention_only"])
def test_tokens_of_odd_shapes(loop: Path, name: str, tmp_path: Path) -> None:
    artifact, _ = export_random(ODD_CONFIGS[name], tmp_path)
    check(loop, artifact.path)
