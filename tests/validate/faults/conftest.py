"""A sound checkpoint, artifacts of it that were exported once, and copies of them to spoil."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

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
from tests.artifacts import copy_cached
from tests.built import digest_of
from tests.llama_tools import needs_llama_cpp
from tests.models import Weights, make_config, random_weights, write_hugging_face

CONFIG = make_config("rrar", width=96, heads=4, lru_width=64, mlp_width=128, vocab_size=300)
"""The embedding scale is 9.8125; √96 = 9.798 is as far from it as 50.596 from 50.5."""
ONNX, GGUF, COREML = (
    {f"onnx-{word}": word for word in ("fp32", "fp16", "int8", "int4")},
    {"gguf-fp32": "f32", "gguf-fp16": "f16", "gguf-int8": "q8_0", "gguf-int4": "q4_0"},
    {f"coreml-{word}": word for word in ("fp32", "fp16", "int8", "int4")},
)
KINDS = [*ONNX, *GGUF, *COREML]
"""Formats and precisions; with int8 and int4, activations are int8 in ONNX and GGUF."""


def export(kind: str, checkpoint: Checkpoint, target: Path) -> Path:
    """Exports a checkpoint in one of `KINDS`."""
    if kind in ONNX:
        block = 32 if kind == "onnx-int4" else None
        return export_onnx(checkpoint, OnnxOptions(precision=ONNX[kind], block_size=block), target)
    if kind in GGUF:
        options = GgufOptions(type=GGUF[kind], pure=kind == "gguf-int4")
        return export_gguf(checkpoint, options, target)
    coreml = CoreMLOptions(precision=COREML[kind], prefill_length=8)
    return export_coreml(checkpoint, coreml, target)


def case(kind: str, *rest: object) -> ParameterSet:
    """Parameters of a test, which `make test` runs with one kind only."""
    marks = [needs_llama_cpp] if kind in GGUF else []
    return pytest.param(kind, *rest, marks=marks + [pytest.mark.full] * (kind != "onnx-int4"))


def sound_weights() -> Weights:
    """Random ones; with this embedding logits are up to 27, as large as a trained model's."""
    weights = random_weights(CONFIG, slowest=1e-5)
    weights["embed_tokens.weight"] *= 4
    return weights


Copy = Callable[[str], Path]
Judge = Callable[[Path], Result]


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """The sound checkpoint, in bf16."""
    folder = tmp_path_factory.mktemp("faults") / "original"
    return write_hugging_face(CONFIG, sound_weights(), folder, dtype="bfloat16")


@pytest.fixture(scope="session")
def clean(original) -> Copy:
    """The sound artifact of a kind, exported once."""

    def clean(kind: str) -> Path:
        target = original.with_name(f"{original.name}-{kind}")
        if not target.exists():
            copy_cached(
                digest_of([Path(__file__)]),
                lambda artifact: export(kind, open_checkpoint(original), artifact),
                target,
            )
        return target

    return clean


@pytest.fixture
def copy(clean, tmp_path) -> Copy:
    """A copy of it, to be spoiled."""

    def copied(kind: str) -> Path:
        source, target = clean(kind), tmp_path / kind
        if source.is_file():
            return Path(shutil.copyfile(source, target))
        return Path(shutil.copytree(source, target))

    return copied


@pytest.fixture(scope="session")
def judge(original) -> Judge:
    """The result of `validate --bisect` with the sound checkpoint as the original."""
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
