"""`validate` on Core ML packages of all kinds, with the interpreter as the engine."""

import sys
from pathlib import Path
from typing import Any

import pytest

from rgexport.griffin.layout import model_tensors
from rgexport.validate.opening import Request
from rgexport.validate.result import Result
from rgexport.validate.run import validate_artifact
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


def failed(result: Result) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


@pytest.mark.parametrize("kind", KINDS)
def test_clean_packages_pass(kind: str, folder: Path) -> None:
    artifact, _ = export_random_coreml(CONFIG, folder, prefill_length=12, **KINDS[kind])
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
