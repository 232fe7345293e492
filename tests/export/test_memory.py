"""Peak memory of an export does not grow with the model, in any format."""

import subprocess
import sys
from pathlib import Path

import pytest

from rgexport.griffin.synthetic import write_random
from tests.artifacts import require_ggml
from tests.models import make_config

pytestmark = pytest.mark.full
PROGRAM = """
import resource, sys
from rgexport.cli import run
assert run(sys.argv[1:]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
GROWTH_MB = 60

SMALL = make_config("rra", width=128, heads=2, vocab_size=2000)
LARGE = make_config("rra", width=1024, heads=4, mlp_width=4096, vocab_size=100_000)


def peak_mb(*command: str | Path) -> int:
    """Of a command in a process of its own."""
    words = [sys.executable, "-c", PROGRAM, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("small", SMALL), ("large", LARGE)):
        write_random(config, folder / name)
        (folder / name / "tokenizer.model").unlink(missing_ok=True)
    weights = sum(file.stat().st_size for file in (folder / "large").glob("*.safetensors"))
    assert weights > 4 * (GROWTH_MB << 20)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
@pytest.mark.parametrize(
    "options",
    ["onnx --int4", "coreml --int4", "coreml --precision pal4", "gguf --type f32", "gguf --int4"],
)
def test_peak_does_not_grow_with_the_model(options: str, models: Path, tmp_path: Path) -> None:
    if options == "gguf --int4":
        require_ggml()
    small, large = (
        peak_mb(*options.split(), "--no-check", "-m", models / name, "-o", tmp_path / name)
        for name in ("small", "large")
    )
    assert large - small < GROWTH_MB
