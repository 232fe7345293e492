"""The scan and the saved program, against DeepMind's model and coremltools.

`tests/runtimes/test_sessions.py` compares whole packages of all shapes with DeepMind's model.
"""

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
from tests.models import make_config
from tests.sessions import distance, random_tokens

SCAN = 5e-5  # largest error allowed after it, as a share of the largest number


def test_scan_of_4096_steps(tmp_path):
    """With decays up to 1 - 1e-5, which a float16 state would lose, in both forms of the state."""
    config, states = make_config("r", width=64, heads=2, mlp_width=32, vocab_size=64), []
    tokens = random_tokens(config, 1, 4096)
    for form in ("io", "hilo"):
        options = {"slowest": 1e-5, "prefill_length": 128, "recurrent_state": form}
        artifact, weights = export_random_coreml(config, tmp_path, **options)
        session = CoreMLSession(artifact)
        last = session.prefill(tokens, 1)
        expected = deepmind_logits(deepmind_model(config, weights), tokens)[:, -1:]
        assert distance(last, expected) <= SCAN
        states.append(session.get_state()["layers.0.rg_lru"])
    _, state = Reference(config, artifact.weights).run(tokens)
    assert distance(states[0], state["layers.0.rg_lru"]) <= SCAN
    assert distance(states[1], states[0]) <= 1e-5


def test_coremltools_rebuilds_the_program(tmp_path):
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


def _declared(function):
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
