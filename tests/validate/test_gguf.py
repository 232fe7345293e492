"""`validate` on GGUF files of all kinds, with llama.cpp as the engine."""

from pathlib import Path

import pytest

from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.validate.opening import Request
from rgexport.validate.run import validate_artifact
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face

pytestmark = needs_llama_cpp

CONFIG = make_config("rra", width=256, heads=4, mlp_width=512, lru_width=256, vocab_size=320)
KINDS = "f32", "f16", "bf16", "q8_0", "q5_1", "q4_0", "q4_k_m", "q2_k"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "original"
    return write_hugging_face(CONFIG, random_weights(CONFIG), folder, dtype="bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_passes(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    export_gguf(open_checkpoint(checkpoint), GgufOptions(type=kind), target)
    result = validate_artifact(target, Request(model=str(checkpoint)))
    assert result.verdict == "PASS", [check for check in result.checks if not check.passed]
    assert (result.artifact.kind, result.artifact.precision) == ("gguf", kind)
    assert result.engine.engine == "llama.cpp"
    assert result.weights is not None and len(result.weights) == len(
        open_checkpoint(checkpoint).weights
    )
    if kind == "f32":
        assert result.twin.logits.relative_max <= 1e-5
        assert result.original is not None and result.original.logits.relative_max <= 1e-5
