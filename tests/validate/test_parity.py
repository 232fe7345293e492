"""`validate` on artifacts of every format: clean ones pass, wrong ones fail."""

import sys
from typing import Any

import pytest

from rgexport.errors import RequestError
from rgexport.griffin.layout import model_tensors
from rgexport.validate.opening import Request
from rgexport.validate.result import Result
from rgexport.validate.run import validate_artifact
from tests.artifacts import export_random_coreml, export_random_gguf
from tests.llama_tools import needs_llama_cpp
from tests.models import make_config, random_weights, write_hugging_face
from tests.validate.conftest import CONFIG, KINDS

COREML: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "fp16-all-logits": {"precision": "fp16", "all_logits": True, "recurrent_state": "hilo"},
    "int8": {"precision": "int8"},
    "int4-fp32": {"precision": "int4", "compute": "fp32", "all_logits": True},
    "int4-asymmetric": {"precision": "int4", "symmetric": False},
    "pal4": {"precision": "pal4", "embedding_precision": "pal4"},
}
GGUF = "f32", "f16", "bf16", "q8_0", "q5_1", "q4_0", "q4_k_m", "q2_k"


def failed(result: Result) -> list[str]:
    return [check.name for check in result.checks if not check.passed]


COSTS = {"fp32": 0, "fp16": 1e-9, "int8": 1e-5, "int4": 1e-2, "int4-exact": 1e-2}
"""Kind → the least KL that it costs; the next kind's is the most."""


@pytest.mark.parametrize("kind", KINDS)
def test_clean_artifacts_pass(clean, checkpoint, kind):
    result = validate_artifact(clean(kind), Request(model=str(checkpoint)))
    assert failed(result) == [] and result.verdict == "PASS"
    assert result.source.found and result.source.same_files
    assert result.text.windows > 4
    assert [error.name for error in result.weights] == list(model_tensors(CONFIG))
    assert result.original.kl.mean >= 0.9 * result.twin.kl.mean
    least, most = COSTS[kind], min((c for c in COSTS.values() if c > COSTS[kind]), default=1)
    assert least <= result.original.kl.mean < most


@pytest.mark.skipif(
    sys.platform == "darwin", reason="Core ML itself rounds otherwise than the interpreter"
)
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "fp16" else pytest.mark.full) for kind in COREML],
)
def test_clean_packages_pass(kind, tmp_path):
    """With the interpreter as the engine."""
    options = COREML[kind]
    artifact, _ = export_random_coreml(CONFIG, tmp_path, prefill_length=12, **options)
    request = Request(model=str(tmp_path / "model"), max_tokens=100)
    result = validate_artifact(artifact.path, request)
    assert failed(result) == [], result.checks
    assert (result.artifact.kind, result.engine.whole_chunks) == ("coreml", True)
    assert result.engine.chunk_logits == options.get("all_logits", False)
    assert result.equivalences["steps"].tokens == 12 + 8
    assert [error.name for error in result.weights] == list(model_tensors(CONFIG))
    if artifact.manifest.compute == "fp32":
        assert result.twin.logits.relative_max < 2e-5
        assert result.equivalences["steps"].logits.relative_max < 2e-5
    else:
        assert 1e-5 < result.twin.logits.relative_max < 1e-2


@needs_llama_cpp
@pytest.mark.parametrize("kind", GGUF)
def test_clean_files_pass(kind, tmp_path):
    config = make_config("rra", width=256, heads=4, mlp_width=512, lru_width=256, vocab_size=320)
    artifact, _ = export_random_gguf(config, tmp_path, kind)
    result = validate_artifact(artifact.path, Request(model=str(tmp_path / "model")))
    assert failed(result) == [] and result.verdict == "PASS"
    assert (result.artifact.kind, result.artifact.precision) == ("gguf", kind)
    assert result.engine.engine == "llama.cpp"
    assert len(result.weights) == len(model_tensors(config))
    if kind == "f32":
        assert result.twin.logits.relative_max <= 1e-5
        assert result.original.logits.relative_max <= 1e-5


def test_without_the_original(clean):
    result = validate_artifact(clean("int4"))
    assert result.verdict == "PASS"
    assert result.original is None and result.weights is None and not result.source.found
    assert result.source.made_from == "original"


@pytest.mark.parametrize(
    "config", [{"soft_cap": 25.0}, {"rope_theta": 20_000.0}, {"rms_eps": 1e-2}]
)
def test_a_graph_that_differs_from_its_manifest_fails(spoil, config):
    result = validate_artifact(spoil("fp32", config=config))
    assert "twin.logits" in failed(result)
    assert result.verdict == "FAIL"


def test_another_model_of_the_same_shape_is_compared(clean, tmp_path):
    cousin = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300, window=20)
    folder = write_hugging_face(cousin, random_weights(cousin, seed=1), tmp_path / "cousin")
    result = validate_artifact(clean("fp32"), Request(model=str(folder), max_tokens=60))
    assert result.source.same_files is False
    assert result.source.config_differences == ("window: 16 → 20",)
    assert {"original.rms"} < set(failed(result))
    assert "twin.logits" not in failed(result)


def test_without_torch(clean, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RequestError, match=r"needs torch .* 'rgexport\[export\]'"):
        validate_artifact(clean("fp32"))
