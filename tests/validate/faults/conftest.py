"""A sound checkpoint, artifacts of it that were exported once, and copies of them to spoil."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.validate.bisect.site_errors import layer_of
from rgexport.validate.opening import Request
from rgexport.validate.result import Result
from rgexport.validate.run import validate_artifact
from tests.models import Weights, make_config, random_weights, write_hugging_face

CONFIG = make_config("rrar", width=96, heads=4, lru_width=64, mlp_width=128, vocab_size=300)
"""The embedding scale is 9.8125; √96 = 9.798 is as far from it as 50.596 from 50.5."""
EXPORTS: dict[str, Callable[[Checkpoint, Path], Path]] = {
    "onnx-fp32": lambda c, t: export_onnx(c, OnnxOptions(precision="fp32"), t),
    "onnx-int4": lambda c, t: export_onnx(c, OnnxOptions(precision="int4", block_size=32), t),
    "gguf-fp32": lambda c, t: export_gguf(c, GgufOptions(type="f32"), t),
    "gguf-int4": lambda c, t: export_gguf(c, GgufOptions(type="q4_0"), t),
    "coreml-fp32": lambda c, t: export_coreml(c, _coreml("fp32"), t),
    "coreml-int4": lambda c, t: export_coreml(c, _coreml("int4"), t),
}
"""Format and precision → how a checkpoint is exported."""


def sound_weights() -> Weights:
    """Random ones; with this embedding logits are up to 27, as large as a trained model's."""
    weights = random_weights(CONFIG)
    weights["embed_tokens.weight"] *= 4
    return weights


Copy = Callable[[str], Path]
Judge = Callable[[Path], Result]


def _coreml(precision: str) -> CoreMLOptions:
    return CoreMLOptions(precision=precision, prefill_length=8)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound checkpoint, in bf16."""
    folder = tmp_path_factory.mktemp("faults") / "original"
    return write_hugging_face(CONFIG, sound_weights(), folder, dtype="bfloat16")


@pytest.fixture(scope="session")
def clean(original: Path) -> Copy:
    """The sound artifact of a kind, exported once."""

    def export(kind: str) -> Path:
        target = original.parent / kind
        return target if target.exists() else EXPORTS[kind](open_checkpoint(original), target)

    return export


@pytest.fixture
def copy(clean: Copy, tmp_path: Path) -> Copy:
    """A copy of it, to be spoiled."""

    def copied(kind: str) -> Path:
        source, target = clean(kind), tmp_path / kind
        if source.is_file():
            return Path(shutil.copyfile(source, target))
        return Path(shutil.copytree(source, target))

    return copied


@pytest.fixture(scope="session")
def judge(original: Path) -> Judge:
    """What `validate --bisect` says of an artifact, held against the sound checkpoint."""
    model, tokens = str(original), 3 * CONFIG.window
    return lambda artifact: validate_artifact(
        artifact, Request(model=model, max_tokens=tokens, bisect=True)
    )


def failed(result: Result) -> set[str]:
    """The kinds of its checks that did not pass; of weights, their names."""
    checks = [check for check in result.checks if not check.passed]
    return {check.name if check.name.startswith("weights.") else check.kind for check in checks}


def require_named(result: Result, site: str) -> None:
    """A fault must fail, and what is suspected first must be its site, in its layer."""
    assert result.verdict == "FAIL"
    assert result.suspects, "nothing is suspected"
    assert result.suspects[0].site == site, result.suspects
    assert result.suspects[0].layer == layer_of(site)
