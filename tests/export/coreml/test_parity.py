"""Stored weights, the scan and the saved program, against DeepMind's model, numpy and coremltools.

`tests/runtimes/coreml/test_session.py` compares whole packages of all shapes with DeepMind's model.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("coremltools")

import coremltools as ct
from coremltools.converters.mil.frontend.milproto.load import load as load_program
from coremltools.converters.mil.mil import types
from coremltools.proto import MIL_pb2

from rgexport.griffin.reference import Reference
from rgexport.runtimes.coreml.session import CoreMLSession
from tests.artifacts import export_random_coreml
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, make_config
from tests.sessions import distance, random_tokens

FP32, SCAN = 2e-5, 1e-5
"""Largest errors allowed, as shares of the largest number: of logits, and after a long scan."""


@pytest.mark.parametrize(
    ("precision", "options"),
    [("int8", {"symmetric": False}), ("int4", {"embedding_precision": "pal4"})],
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
    logits = CoreMLSession(artifact).prefill(tokens, tokens.shape[1])
    assert distance(logits, expected) <= FP32


@pytest.mark.parametrize("form", [pytest.param("io", marks=pytest.mark.full), "hilo"])
def test_scan_of_4096_steps(form: str, tmp_path: Path) -> None:
    config = make_config("r", width=64, heads=2, mlp_width=32, vocab_size=64)
    artifact, weights = export_random_coreml(
        config, tmp_path, prefill_length=128, recurrent_state=form
    )
    tokens = random_tokens(config, 1, 4096)
    session = CoreMLSession(artifact)
    last = session.prefill(tokens, 1)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)[:, -1:]
    assert distance(last, expected) <= SCAN
    _, state = Reference(config, artifact.weights).run(tokens)
    name = "layers.0.rg_lru"
    assert distance(session.get_state()[name], state[name]) <= SCAN


def test_coremltools_rebuilds_the_program(tmp_path: Path) -> None:
    """Which has all kinds of operations: a palette, blocks (of the embedding) and floats."""
    config = make_config("ra", width=64, heads=2, lru_width=96)
    artifact, _ = export_random_coreml(config, tmp_path, "pal4", recurrent_state="hilo")
    path = str(artifact.path / "model.mlpackage")
    model = ct.models.MLModel(path, skip_model_load=True, function_name="decode")
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
        assert declared.items() <= inferred.items()


def _declared(function: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the saved program says of its values."""
    words = {"FLOAT16": "fp16", "FLOAT32": "fp32", "INT32": "int32", "BOOL": "bool"}
    values = {}
    for operation in function.block_specializations[function.opset].operations:
        for output in operation.outputs:
            tensor = output.type.tensorType
            dtype = MIL_pb2.DataType.Name(tensor.dataType)
            shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
            values[output.name] = (words.get(dtype, dtype.lower()), shape)
    return values
