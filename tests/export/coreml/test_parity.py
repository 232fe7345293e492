"""Stored weights, the scan and the saved program, against DeepMind's model, numpy and coremltools.

`tests/runtimes/coreml/test_session.py` compares whole packages of all shapes with DeepMind's model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools as ct
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import types
from coremltools.proto import MIL_pb2

from rgexport.export.coreml.package import PACKAGE
from rgexport.export.mil.package import open_package
from rgexport.export.mil.program import Function, Name
from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner
from rgexport.runtimes.coreml.session import CoreMLSession
from tests.artifacts import export_random_coreml
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, make_config
from tests.sessions import distance, random_tokens

FP32, SCAN = 2e-5, 1e-5
"""Largest errors allowed, as shares of the largest number: of logits, and of the scan's state."""
RECURRENT_STATES = ("io", "hilo")


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp16", {}),
        ("int8", {}),
        ("int8", {"symmetric": False}),
        ("int4", {"symmetric": False}),
        ("pal4", {}),
        ("int4", {"embedding_precision": "pal4"}),
    ],
)
def test_stored_weights_are_those_of_the_artifact(
    precision: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """DeepMind's model with the artifact's dequantized weights computes what the package does."""
    config = ODD_CONFIGS["narrow_lru"]
    asked = {"compute": "fp32", "all_logits": True, "prefill_length": 5, **options}
    artifact, weights = export_random_coreml(config, tmp_path, precision, **asked)
    dequantized = {name: artifact.tensor(name).whole() for name in weights}
    tokens = random_tokens(config, 1, 2 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, dequantized), tokens)
    found = CoreMLSession(artifact).prefill(tokens, tokens.shape[1])
    assert distance(found, expected) <= FP32


class KeepingRunner(InterpreterRunner):
    """Keeps some values of every call."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        super().__init__(open_package(path), also=names)
        self.kept: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any) -> Any:
        outputs = super().predict(function, inputs, state)
        for name, arrays in self.kept.items():
            arrays.append(outputs[name])
        return outputs


def scan_operands(decode: Function) -> tuple[str, str]:
    """The names of a and b of the only layer's scan `h = b + a · h0`.

    Both functions compute a and b by the same operations, under the same names.
    """
    given = {
        name: [value.name for bound in op.inputs.values() for value in bound
               if isinstance(value, Name)]
        for op in decode.operations
        for name, _ in op.outputs
    }  # fmt: skip

    def has_state(name: str) -> bool:
        return name.startswith("recurrent_state") or any(map(has_state, given.get(name, ())))

    b, product = sorted(given["layers_0_temporal_block_rg_lru"], key=has_state)
    a, _ = sorted(given[product], key=has_state)
    return a, b


@pytest.mark.parametrize("recurrent_state", RECURRENT_STATES)
def test_scan_of_4096_steps_on_equal_inputs(recurrent_state: Any, tmp_path: Path) -> None:
    config = make_config("r", width=64, heads=2, mlp_width=32, vocab_size=64)
    artifact, _ = export_random_coreml(
        config, tmp_path, prefill_length=128, recurrent_state=recurrent_state
    )
    path = artifact.file(PACKAGE)
    names = scan_operands(open_package(path).functions["decode"])
    tokens = random_tokens(config, 1, 4096)
    for wanted in (1, 4096):  # with all logits, tokens are decoded one by one
        runner = KeepingRunner(path, names)
        session = CoreMLSession(artifact, runner=runner)
        session.prefill(tokens, wanted)
        a, b = (
            np.concatenate([array.reshape(-1, config.lru_width) for array in runner.kept[name]])
            for name in names
        )
        assert len(a) == len(b) == 4096
        h = np.zeros(config.lru_width)
        for step in range(4096):
            h = a[step].astype(np.float64) * h + b[step]
        assert distance(session.get_state()["layers.0.rg_lru"][0], h) <= SCAN


@pytest.mark.parametrize("precision", ["fp32", "int4", "pal4"])
def test_coremltools_rebuilds_the_program(precision: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS["wide_lru"]
    artifact, _ = export_random_coreml(config, tmp_path, precision, recurrent_state="hilo")
    path = str(artifact.path / "model.mlpackage")
    for name in ("prefill", "decode"):
        model = ct.models.MLModel(path, skip_model_load=True, function_name=name)
    with pytest.raises(ValueError, match="not found"):
        ct.models.MLModel(path, skip_model_load=True, function_name="main")
    spec = model.get_spec()
    assert spec.description.defaultFunctionName == "decode"
    program = load_program(spec, spec.specificationVersion, model.weights_dir)
    assert program.functions.keys() == {"decode", "prefill"}
    for name, function in program.functions.items():
        declared = _declared(spec.mlProgram.functions[name])
        inferred = {
            value.name: (types.builtin_to_string(value.dtype), tuple(value.shape))
            for operation in function.operations
            for value in operation.outputs
        }
        assert declared.keys() <= inferred.keys()
        assert {key: inferred[key] for key in declared} == declared


def _declared(function: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the saved program says of its values."""
    words = {"FLOAT16": "fp16", "FLOAT32": "fp32", "INT32": "int32", "BOOL": "bool"}
    found = {}
    for operation in function.block_specializations[function.opset].operations:
        for output in operation.outputs:
            tensor = output.type.tensorType
            dtype = MIL_pb2.DataType.Name(tensor.dataType)
            shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
            found[output.name] = (words.get(dtype, dtype.lower()), shape)
    return found
