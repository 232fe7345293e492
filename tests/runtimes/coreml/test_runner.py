"""The adapter to Core ML, with a double of coremltools: Core ML itself runs on macOS only."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.coreml.package import PACKAGE
from rgexport.export.mil.package import open_package
from rgexport.runtimes.coreml import runner as coreml_runner
from rgexport.runtimes.coreml.interpreter.interpreter import Interpreter
from rgexport.runtimes.coreml.interpreter.weights import WeightCache
from rgexport.runtimes.coreml.runner import FrameworkRunner
from rgexport.runtimes.coreml.session import CoreMLSession
from tests.artifacts import export_random_coreml
from tests.models import ODD_CONFIGS


class FakeState:
    """As `coremltools.models.model.MLState`."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def read_state(self, name: str) -> np.ndarray:
        return self.arrays[name].copy()

    def write_state(self, name: str, value: np.ndarray) -> None:
        assert value.dtype == np.float16 and value.shape == self.arrays[name].shape
        self.arrays[name] = value.copy()


class FakeModel:
    """As `coremltools.models.MLModel`, as far as it is documented and used."""

    def __init__(self, path: str, *, compute_units: Any, function_name: str) -> None:
        assert compute_units is coremltools.ComputeUnit.CPU_AND_GPU
        package = open_package(path)
        if function_name not in package.functions:
            raise RuntimeError(f"no function\n{function_name}")
        self._run = Interpreter(package, function_name, WeightCache())

    def make_state(self) -> FakeState:
        states = self._run.states.items()
        return FakeState({name: np.zeros(type.shape, np.float16) for name, type in states})

    def predict(self, data: Mapping[str, np.ndarray], state: FakeState) -> dict[str, np.ndarray]:
        return self._run(data, state.arrays)


TOOLS = SimpleNamespace(
    ComputeUnit=coremltools.ComputeUnit,
    models=SimpleNamespace(MLModel=FakeModel),
    __version__="9.0",
)


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(coreml_runner, "_coremltools", lambda: TOOLS)
    return export_random_coreml(
        ODD_CONFIGS["wide_lru"], tmp_path, "fp16", prefill_length=8, recurrent_state="hilo"
    )[0]


def test_the_session_is_the_same(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = CoreMLSession(artifact)
    monkeypatch.setattr(coreml_runner.sys, "platform", "darwin")
    session = CoreMLSession(artifact)
    assert session.info.engine == "Core ML" and "coremltools 9.0" in session.info.engine_version
    tokens = np.random.default_rng(0).integers(0, 256, (2, 21))
    for one in (session, expected):
        one.reset(2)
    np.testing.assert_array_equal(session.prefill(tokens, 3), expected.prefill(tokens, 3))
    state = session.get_state()
    session.reset()
    session.set_state(state)
    np.testing.assert_array_equal(session.step(tokens[:, 0]), expected.step(tokens[:, 0]))


def test_the_double_has_what_coremltools_has() -> None:
    """The names of methods and parameters that the adapter uses."""
    import inspect

    from coremltools.models.model import MLState

    for method, parameters in {
        coremltools.models.MLModel.__init__: {"compute_units", "function_name"},
        coremltools.models.MLModel.predict: {"data", "state"},
        coremltools.models.MLModel.make_state: set[str](),
        MLState.read_state: {"name"},
        MLState.write_state: {"name", "value"},
    }.items():
        assert parameters <= inspect.signature(method).parameters.keys()


def test_what_core_ml_refuses_is_one_line(artifact: Artifact) -> None:
    with pytest.raises(RequestError, match=r"Core ML cannot load other of .*: no function other"):
        FrameworkRunner(artifact.file(PACKAGE), ["other"])


def test_without_coremltools(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(RequestError, match=r"pip install 'rgexport\[coreml\]'"):
        FrameworkRunner(Path("x.mlpackage"), ["decode"])
