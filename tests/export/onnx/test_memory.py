"""Peak memory of an export does not grow with the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from rgexport.griffin.synthetic import write_random
from tests.models import make_config

PROGRAM = """
import resource, sys
from pathlib import Path
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
model, precision, target = sys.argv[1:]
export_onnx(open_checkpoint(model), OnnxOptions(precision=precision), Path(target))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
GROWTH_MB = 60


def _peak_mb(model: Path, precision: str, target: Path) -> int:
    command = [sys.executable, "-c", PROGRAM, str(model), precision, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_peak_does_not_grow_with_the_model(precision: str, tmp_path: Path) -> None:
    small = make_config("rra", width=128, heads=2, vocab_size=2000)
    large = make_config("rra", width=1024, heads=4, mlp_width=4096, vocab_size=100_000)
    peaks = {}
    for name, config in (("small", small), ("large", large)):
        write_random(config, tmp_path / name)
        peaks[name] = _peak_mb(tmp_path / name, precision, tmp_path / f"{name}-{precision}")
    weights = sum(f.stat().st_size for f in (tmp_path / "large").glob("*.safetensors"))
    assert weights > 4 * (GROWTH_MB << 20)
    assert peaks["large"] - peaks["small"] < GROWTH_MB
