"""A sound checkpoint, artifacts of it that were exported once, and copies of them to spoil."""

from pathlib import Path

import pytest

from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.validate.opening import ValidationRequest
from rgexport.validate.result import ValidationResult
from rgexport.validate.run import validate_artifact
from tests.artifacts import copy_cached
from tests.built import digest_of
from tests.llama_tools import needs_llama_cpp
from tests.models import Weights, make_config, random_weights, write_hugging_face

CONFIG = make_config("rrar", width=96, heads=4, lru_width=64, mlp_width=128, vocab_size=300)
"""The embedding scale is 9.8125; √96 = 9.798 is as far from it as 50.596 from 50.5."""
PRECISIONS = {"fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_0"}
"""And what GGUF calls them; with int8 and int4, activations are int8 in ONNX and GGUF."""
KINDS = [f"{name}-{word}" for name in ("onnx", "gguf", "coreml") for word in PRECISIONS]


def export(kind: str, checkpoint: Checkpoint, target: Path) -> Path:
    name, word = kind.split("-")
    if name == "onnx":
        block = 32 if word == "int4" else None
        return export_onnx(checkpoint, OnnxOptions(precision=word, block_size=block), target)
    if name == "gguf":
        options = GgufOptions(type=PRECISIONS[word], pure=word == "int4")
        return export_gguf(checkpoint, options, target)
    return export_coreml(checkpoint, CoreMLOptions(precision=word, prefill_length=8), target)


def case(kind: str, *rest: object):
    """Parameters of a test, which `make test` runs with one kind only."""
    marks = [needs_llama_cpp] if kind.startswith("gguf") else []
    return pytest.param(kind, *rest, marks=marks + [pytest.mark.full] * (kind != "onnx-int4"))


def sound_weights() -> Weights:
    """Random ones; with this embedding logits are up to 27, as large as a trained model's."""
    weights = random_weights(CONFIG, slowest=1e-5)
    weights["embed_tokens.weight"] *= 4
    return weights


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "original"
    return write_hugging_face(CONFIG, sound_weights(), folder, dtype="bfloat16")


@pytest.fixture
def copy(original, tmp_path):
    """A copy of the sound artifact of a kind, which is exported once, to be spoiled."""

    def copied(kind: str) -> Path:
        target, checkpoint = tmp_path / kind, open_checkpoint(original)
        key = digest_of([Path(__file__)])
        copy_cached(key, lambda artifact: export(kind, checkpoint, artifact), target)
        return target

    return copied


@pytest.fixture(scope="session")
def judge(original):
    """The result of `validate --bisect` with the sound checkpoint as the original, of any graph."""
    asked = {"max_tokens": 3 * CONFIG.window, "bisect": True, "limits": {"structure": 1}}
    request = ValidationRequest(model=str(original), **asked)
    return lambda artifact: validate_artifact(artifact, request)


def require_named(result: ValidationResult, site: str) -> None:
    """A fault must fail, and what is suspected first must be its site."""
    assert result.verdict == "FAIL" and result.suspects, "nothing is suspected"
    assert result.suspects[0].site == site, result.suspects
