"""Gates that a checkpoint has in bfloat16 stay so: half of the bytes, the same numbers."""

from pathlib import Path

import numpy as np
import pytest

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.artifact import MODEL_FILE
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.native import native_ops
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.kernels.onnx.library import NO_NATIVE
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import BFLOAT16, Affine, Float
from rgexport.runtimes.onnx.mapped_weights import MappedWeights
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.validate.weights.steps import step_sizes
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face
from tests.sessions import random_tokens

CONFIG = ODD_CONFIGS["irregular"]
GATES = {name for name, spec in model_tensors(CONFIG).items() if spec.role == "gate"}
MATRICES = {name for name in GATES if name.endswith("weight")}


def exported(folder: Path, dtype: str, **options) -> Artifact:
    """From weights that bfloat16 holds, in a checkpoint of that dtype."""
    weights = {name: in_bfloat16(array) for name, array in random_weights(CONFIG).items()}
    model = write_hugging_face(CONFIG, weights, folder / dtype, dtype=dtype)
    target = folder / f"{dtype}-{'-'.join(map(str, options.values()))}"
    return open_artifact(export_onnx(open_checkpoint(model), OnnxOptions(**options), target))


def in_bfloat16(array: np.ndarray) -> np.ndarray:
    return array.astype("bfloat16").astype(np.float32)


def dtypes(artifact: Artifact, names: set[str]) -> set[str]:
    return {artifact.manifest.tensors[name].parts["data"].dtype for name in names}


@pytest.mark.parametrize(("native", "compute"), [(True, None), (False, None), (True, "fp16")])
def test_results_are_those_of_float32_gates(native, compute, tmp_path, monkeypatch):
    if not native:
        monkeypatch.setenv(NO_NATIVE, "1")
    short, wide = (exported(tmp_path, dtype, compute=compute) for dtype in ("bfloat16", "float32"))
    assert dtypes(short, MATRICES) == {"bfloat16"} and dtypes(wide, MATRICES) == {"float32"}
    assert dtypes(short, GATES - MATRICES) == {"float32"}
    tokens = random_tokens(CONFIG, 2, 30)
    first, second = sessions = [OrtSession(artifact) for artifact in (short, wide)]
    for session in sessions:
        session.reset(2)
    for at in (slice(0, 25), slice(25, 26), slice(26, 30)):
        count = len(range(30)[at])
        found = first.prefill(tokens[:, at], count)
        np.testing.assert_array_equal(found, second.prefill(tokens[:, at], count))


def test_validation_allows_no_rounding_of_them(tmp_path):
    """The checkpoint has these numbers, so half a step of bfloat16 would be a fault."""
    artifact = exported(tmp_path, "bfloat16")
    for name in MATRICES:
        w = artifact.weights[name].whole().reshape(len(artifact.weights[name].whole()), -1)
        steps = step_sizes(name, w, artifact.manifest.tensors[name]).step
        assert (steps <= np.maximum(np.abs(w) * 2.0**-22, 2.0**-126)).all()


def test_kernels_read_all_weights_where_the_file_is_mapped(tmp_path):
    artifact = exported(tmp_path, "bfloat16")
    weights = native_ops(artifact.file(MODEL_FILE)).weights
    assert {tensor.name for tensor in weights} >= MATRICES
    mapped = MappedWeights(artifact.path, weights).values
    assert mapped.keys() == {tensor.name for tensor in weights}


@pytest.mark.parametrize(
    "options",
    [{"profile": "wasm"}, {"profile": "webgpu"}, {"precision": "fp32"}, {"precision": "fp16"}],
)
def test_elsewhere_they_are_float32(options, tmp_path):
    assert dtypes(exported(tmp_path, "bfloat16", **options), GATES) == {"float32"}


def test_a_plan_says_it(tmp_path):
    eight = Affine(8, 64, symmetric=True)
    plan = make_plan(CONFIG, eight, eight)
    model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model", dtype="bfloat16")
    checkpoint = open_checkpoint(model)
    wide = open_artifact(export_onnx(checkpoint, OnnxOptions(plan=plan), tmp_path / "wide"))
    assert dtypes(wide, MATRICES) == {"float32"}
    asked = plan | dict.fromkeys(MATRICES, BFLOAT16)
    short = open_artifact(export_onnx(checkpoint, OnnxOptions(plan=asked), tmp_path / "short"))
    assert dtypes(short, MATRICES) == {"bfloat16"}
    web = OnnxOptions(plan=asked, profile="wasm").resolve_plan(CONFIG)
    assert {web[name] for name in MATRICES} == {Float("float32")}


def test_what_bfloat16_would_round_is_float32(tmp_path):
    """A plan of a model in bfloat16, for one of the same shape that was tuned in float32."""
    eight = Affine(8, 64, symmetric=True)
    plan = make_plan(CONFIG, eight, eight) | dict.fromkeys(MATRICES, BFLOAT16)
    model = write_hugging_face(CONFIG, random_weights(CONFIG), tmp_path / "model")
    target = export_onnx(open_checkpoint(model), OnnxOptions(plan=plan), tmp_path / "artifact")
    assert dtypes(open_artifact(target), GATES) == {"float32"}
