"""Two ONNX Runtimes in one process: each calls our kernels, which call it and not the other."""

import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from rgexport.export.onnx.graph import OPSET
from rgexport.kernels.onnx import library
from tests.kernels.onnx import programs
from tests.kernels.onnx.one_node import Case, model, run_model

DEBIANS = Path("/usr/lib/x86_64-linux-gnu/libonnxruntime.so")
OURS = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))

OPSET_OF_BOTH = 21

pytestmark = [
    pytest.mark.full,
    programs.needs_compiler,
    pytest.mark.skipif(not library.kernels().ops, reason=library.kernels().reason),
]


def norm() -> Case:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 3, 64), np.float32), rng.standard_normal(64, np.float32)
    return Case(
        "RmsNorm", {"x": x, "weight": weight}, {"y": x.shape}, weights=frozenset({"weight"})
    )


def model_and_bits(case: Case, opset: int = OPSET) -> tuple[bytes, str]:
    """A model of one op, in an opset that a release may know, and the bits of its output."""
    made = onnx.load_from_string(model(case))
    next(imported for imported in made.opset_import if not imported.domain).version = opset
    outputs, _ = run_model(made.SerializeToString(), {"x": case.given["x"]}, {}, case.outputs)
    bits = outputs["y"].view(np.uint32).ravel()
    return made.SerializeToString(), "".join(f"{word:08x}" for word in bits)


def text_of(x: np.ndarray) -> str:
    """Numbers for the program's stdin, which reads each back as it is."""
    return " ".join(repr(float(value)) for value in x.ravel())


def test_a_run_calls_the_runtime_that_made_the_kernel():
    folder = programs.two_tables()
    command = [folder / "two_tables", library.LIBRARY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, result, refusal = done.stdout.splitlines()
    assert first.split() == ["1", "2", "1"], "a domain, two runs, a refusal"
    assert second.split() == ["1", "0", "0"], "a domain, although the first has one"
    assert result == "" and refusal == "SoftCap: input 0 is missing"


@pytest.mark.skipif(
    not (DEBIANS.is_file() and programs.ORT_HEADERS.is_dir() and OURS),
    reason="not installed: a second ONNX Runtime, such as Debian's libonnxruntime-dev",
)
def test_two_releases_in_one_process(tmp_path):
    x = norm().given["x"]
    made, expected = model_and_bits(norm(), OPSET_OF_BOTH)
    (tmp_path / "norm.onnx").write_bytes(made)
    program = programs.several_runtimes() / "several_runtimes"
    command = [program, library.LIBRARY, tmp_path / "norm.onnx", str(x.shape[-1])]
    done = subprocess.run(
        [*command, OURS[0], DEBIANS], input=text_of(x), capture_output=True, text=True, timeout=100
    )
    versions, outputs, refusals, calls = np.split(done.stdout.splitlines(), [2, 4, 6])
    assert len(set(versions)) == 2 and onnxruntime.__version__ in versions
    assert outputs.tolist() == [expected] * 2
    assert all("RmsNorm: weight must be as wide as x" in refusal for refusal in refusals)
    assert calls.tolist() == ["4"] and done.returncode == 0
