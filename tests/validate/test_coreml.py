"""`validate` on Core ML packages of all kinds, with the interpreter as the engine."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.export.artifact import Artifact
from rgexport.griffin.layout import model_tensors
from rgexport.runtimes.coreml.session import CoreMLSession, Runner
from rgexport.validate.measure import Measurement, measure
from rgexport.validate.opening import Request
from rgexport.validate.reference_pass import run_reference, torch_reference
from rgexport.validate.result import Result
from rgexport.validate.run import validate_artifact
from rgexport.validate.text import random_text
from tests.artifacts import export_random_coreml
from tests.models import make_config

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="Core ML itself rounds otherwise than the interpreter"
)
CONFIG = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300)
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "fp16-all-logits": {"precision": "fp16", "all_logits": True, "recurrent_state": "hilo"},
    "int8": {"precision": "int8"},
    "int4-fp32": {"precision": "int4", "compute": "fp32", "all_logits": True},
    "int4-asymmetric": {"precision": "int4", "symmetric": False},
    "pal4": {"precision": "pal4", "embedding_precision": "pal4"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coreml")


def package(folder: Path, kind: str) -> Artifact:
    return export_random_coreml(CONFIG, folder, prefill_length=12, **KINDS[kind])[0]


def failed(result: Result) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


@pytest.mark.parametrize("kind", KINDS)
def test_clean_packages_pass(kind: str, folder: Path) -> None:
    artifact = package(folder, kind)
    result = validate_artifact(artifact.path, Request(model=str(folder / "model"), max_tokens=100))
    assert failed(result) == [], result.checks
    assert (result.artifact.kind, result.engine.whole_chunks) == ("coreml", True)
    assert result.engine.chunk_logits == KINDS[kind].get("all_logits", False)
    assert result.equivalences["steps"].tokens == 12 + 8
    assert result.weights is not None
    assert [error.name for error in result.weights] == list(model_tensors(CONFIG))
    assert result.original is not None
    if artifact.manifest.compute == "fp32":
        assert result.twin.logits.relative_max < 2e-5
        assert result.equivalences["steps"].logits.relative_max < 2e-5
    else:
        assert 1e-5 < result.twin.logits.relative_max < 1e-2


class WrongPrefill:
    """A runner whose `prefill` is wrong in one of its outputs or states."""

    def __init__(self, runner: Runner, what: str) -> None:
        self._runner, self._what = runner, what
        self.engine, self.version = runner.engine, runner.version

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def predict(
        self, function: str, inputs: Mapping[str, np.ndarray], state: Any
    ) -> dict[str, np.ndarray]:
        """As it should be, and then not."""
        outputs = dict(self._runner.predict(function, inputs, state))
        if function == "prefill" and self._what in outputs:
            outputs[self._what] = outputs[self._what] * np.float32(1.1)
        elif function == "prefill":
            value = self._runner.read_state(state, self._what)
            self._runner.write_state(state, self._what, np.roll(value, 1, axis=2))
        return outputs


def _measured(artifact: Artifact, what: str | None) -> Measurement:
    tokens = random_text(CONFIG.vocab_size, 40).tokens
    weights = artifact.weights
    reference = run_reference("Running", torch_reference("cpu"), CONFIG, weights, tokens)
    session = CoreMLSession(artifact)
    if what is not None:
        session = CoreMLSession(artifact, runner=WrongPrefill(session._runner, what))
    return measure(session, tokens, [reference])


@pytest.mark.parametrize(
    "what", [None, "logits", "recurrent_state_out", "layers_0_conv1d", "layers_2_key"]
)
def test_a_wrong_prefill_is_seen(what: str | None, folder: Path) -> None:
    """Though the logits of the text are those of `decode`."""
    found = _measured(package(folder, "fp16"), what)
    assert found.comparisons[0].logits.relative_max < 1e-2
    worst = max(
        [
            found.equivalences["steps"].logits.relative_max,
            *(state.relative_max for state in found.equivalences["steps"].states),
        ]
    )
    assert (worst < 1e-2) if what is None else (worst > 3e-2)
