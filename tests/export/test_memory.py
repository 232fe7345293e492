"""Peak memory of an export does not grow with the model, in any format."""

import subprocess
import sys
from pathlib import Path

import pytest

from rgexport.griffin.synthetic import write_random
from tests.artifacts import require_ggml
from tests.models import make_config

PROGRAM = """
import resource, sys
from pathlib import Path
from rgexport.export.{folder}.exporter import {export}
from rgexport.export.{folder}.options import {options}
from rgexport.griffin.checkpoint import open_checkpoint
model, precision, target = sys.argv[1:]
{export}(open_checkpoint(model), {options}({word}=precision), Path(target))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
EXPORTERS = {
    "onnx": ("export_onnx", "OnnxOptions", "precision"),
    "coreml": ("export_coreml", "CoreMLOptions", "precision"),
    "gguf": ("export_gguf", "GgufOptions", "type"),
}
GROWTH_MB = 60

SMALL = make_config("rra", width=128, heads=2, vocab_size=2000)
LARGE = make_config("rra", width=1024, heads=4, mlp_width=4096, vocab_size=100_000)


def peak_mb(model: Path, folder: str, precision: str, target: Path) -> int:
    """Of an export in a process of its own."""
    export, options, word = EXPORTERS[folder]
    program = PROGRAM.format(folder=folder, export=export, options=options, word=word)
    command = [sys.executable, "-c", program, str(model), precision, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("small", SMALL), ("large", LARGE)):
        write_random(config, folder / name)
        (folder / name / "tokenizer.model").unlink(missing_ok=True)
    weights = sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))
    assert weights > 4 * (GROWTH_MB << 20)
    return folder


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
@pytest.mark.parametrize(
    ("folder", "precision"),
    [
        ("onnx", "int4"),
        ("onnx", "fp16"),
        ("coreml", "int4"),
        ("coreml", "pal4"),
        ("gguf", "f32"),
        ("gguf", "q4_0"),
    ],
)
def test_peak_does_not_grow_with_the_model(
    folder: str, precision: str, models: Path, tmp_path: Path
) -> None:
    if precision.startswith("q"):
        require_ggml()
    small, large = (
        peak_mb(models / name, folder, precision, tmp_path / f"{name}.gguf")
        for name in ("small", "large")
    )
    assert large - small < GROWTH_MB
