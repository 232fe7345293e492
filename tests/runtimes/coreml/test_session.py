"""What Core ML sessions have of their own; see tests/runtimes/test_sessions.py.

The adapter to Core ML runs with a double of coremltools: Core ML itself runs on macOS only.
"""

import sys

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools

from rgexport.artifacts.coreml.mil.package import open_package
from rgexport.artifacts.coreml.package import PACKAGE
from rgexport.errors import RequestError
from rgexport.runtimes.coreml import session as coreml_session
from rgexport.runtimes.coreml.interpreter.interpreter import Interpreter, InterpreterRunner
from rgexport.runtimes.coreml.interpreter.weights import WeightCache
from rgexport.runtimes.coreml.session import CoreMLSession, FrameworkRunner
from tests.artifacts import export_random_coreml
from tests.models import ODD_CONFIGS
from tests.sessions import random_tokens


@pytest.mark.parametrize("all_logits", [False, True])
def test_chunks_go_through_prefill(all_logits, tmp_path, monkeypatch):
    """Without all logits, tokens whose logits are wanted are decoded unless they end a chunk."""
    functions, predict = [], InterpreterRunner.predict

    def count(self, function, inputs, state):
        functions.append(function)
        return predict(self, function, inputs, state)

    monkeypatch.setattr(InterpreterRunner, "predict", count)
    config, options = ODD_CONFIGS["hawk"], {"prefill_length": 8, "all_logits": all_logits}
    session = CoreMLSession(export_random_coreml(config, tmp_path, **options)[0])
    assert session.info.chunk_logits == all_logits and session.info.prefill_chunk == 8
    for wanted, whole_chunks in {1: 5, 3: 5, 11: 4, 99: 0}.items():
        session.reset()
        functions.clear()
        session.prefill(random_tokens(config, 1, 42), wanted)
        whole = 5 if all_logits else whole_chunks
        assert functions.count("prefill") == whole and len(functions) == whole + 42 - 8 * whole


class FakeState:
    """As `coremltools.models.model.MLState`."""

    def __init__(self, arrays):
        self.arrays = arrays

    def read_state(self, name):
        return self.arrays[name].copy()

    def write_state(self, name, value):
        assert value.dtype == np.float16 and value.shape == self.arrays[name].shape
        self.arrays[name] = value.copy()


class FakeModel:
    """As `coremltools.models.MLModel`, as far as it is documented and used."""

    def __init__(self, path, *, compute_units, function_name):
        assert compute_units is coremltools.ComputeUnit.CPU_AND_GPU
        package = open_package(path)
        if function_name not in package.functions:
            raise RuntimeError(f"no function\n{function_name}")
        self._run = Interpreter(package, function_name, WeightCache())
        self._states = package.functions[function_name].states

    def make_state(self):
        states = self._states.items()
        return FakeState({name: np.zeros(type.shape, np.float16) for name, type in states})

    def predict(self, data, state):
        return self._run(data, state.arrays)


def test_a_session_of_core_ml_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(coremltools.models, "MLModel", FakeModel)
    options = {"prefill_length": 8, "recurrent_state": "hilo"}
    artifact, _ = export_random_coreml(ODD_CONFIGS["wide_lru"], tmp_path, "fp16", **options)
    expected = CoreMLSession(artifact)
    monkeypatch.setattr(coreml_session.sys, "platform", "darwin")
    session = CoreMLSession(artifact)
    assert session.info.engine == "Core ML" and "coremltools 9" in session.info.engine_version
    tokens = np.random.default_rng(0).integers(0, 256, (2, 21))
    for one in (session, expected):
        one.reset(2)
    np.testing.assert_array_equal(session.prefill(tokens, 3), expected.prefill(tokens, 3))
    state = session.get_state()
    session.reset()
    session.set_state(state)
    np.testing.assert_array_equal(session.step(tokens[:, 0]), expected.step(tokens[:, 0]))
    with pytest.raises(RequestError, match=r"Core ML cannot load other of .*: no function other"):
        FrameworkRunner(artifact.file(PACKAGE), ["other"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(RequestError, match=r"pip install 'rgexport\[coreml\]'"):
        FrameworkRunner(artifact.file(PACKAGE), ["decode"])
