"""`validate` on GGUF files of all kinds, with llama.cpp as the engine."""

from pathlib import Path

import numpy as np
import pytest

from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.validate.opening import Request
from rgexport.validate.result import Result
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


def _validate(checkpoint: Path, target: Path, **options: object) -> Result:
    export_gguf(open_checkpoint(checkpoint), GgufOptions(**options), target)  # type: ignore[arg-type]
    return validate_artifact(target, Request(model=str(checkpoint)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_passes(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    result = _validate(checkpoint, tmp_path / "model.gguf", type=kind)
    assert result.verdict == "PASS", [check for check in result.checks if not check.passed]
    assert (result.artifact.kind, result.artifact.precision) == ("gguf", kind)
    assert result.engine.engine == "llama.cpp"
    assert result.weights is not None and len(result.weights) == len(
        open_checkpoint(checkpoint).weights
    )
    if kind == "f32":
        assert result.twin.logits.relative_max <= 1e-5
        assert result.original is not None and result.original.logits.relative_max <= 1e-5


def test_a_spoiled_layer_fails(checkpoint: Path, tmp_path: Path) -> None:
    """Another gain of one projection in the original: the weights and the logits tell."""
    weights = {name: tensor.whole() for name, tensor in open_checkpoint(checkpoint).weights.items()}
    name = "layers.1.temporal_block.linear_out.weight"
    weights[name] = (weights[name].astype(np.float32) * 1.05).astype(weights[name].dtype)
    other = write_hugging_face(CONFIG, weights, tmp_path / "other", dtype="bfloat16")
    target = export_gguf(open_checkpoint(other), GgufOptions(type="q8_0"), tmp_path / "m.gguf")
    result = validate_artifact(target, Request(model=str(checkpoint)))
    failed = [check.name for check in result.checks if not check.passed]
    assert f"weights.{name}.projection" in failed
    assert not any(check.startswith("twin.") for check in failed)


@pytest.mark.slow
def test_fewer_bits_cost_more(tmp_path: Path) -> None:
    """On the demo: KL(original ‖ artifact) in the order of the bits, each at least 1.5 times."""
    costs = []
    for kind in ("f16", "q8_0", "q5_1", "q4_0"):
        target = tmp_path / f"{kind}.gguf"
        export_gguf(
            open_checkpoint(size="demo"),
            GgufOptions(type=kind, pure=kind in ("q5_1", "q4_0")),
            target,
        )
        original = validate_artifact(target, Request(max_tokens=400)).original
        assert original is not None
        costs.append(original.kl.mean)
    assert all(1.5 * fine < coarse for fine, coarse in zip(costs, costs[1:], strict=False)), costs
