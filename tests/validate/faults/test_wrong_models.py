"""Wrong models in the formats and precisions that users run, at default limits: none passes.

What is exported is a sound artifact of another model, or one of the right model whose stored
weights were altered. `bench.verdicts` asks the same of the demo, and of more formats.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.wrong_models import SPOILED, WRONG_WEIGHTS, matrix_of
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.validate import opening
from rgexport.validate.opening import Request
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.reference.reference_reader import read_reference
from rgexport.validate.result import Result
from rgexport.validate.run import validate_artifact
from rgexport.validate.self_check import self_check
from tests.models import write_hugging_face
from tests.validate.faults.conftest import CONFIG, KINDS, case, export_once, sound_weights

QUANTIZED = [kind for kind in KINDS if "int" in kind]
GROSS = [name for name in WRONG_WEIGHTS if "times" not in name and "one tensor" not in name]
"""Those whose KL is above 1."""


@pytest.fixture(scope="session")
def reference(original: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferenceFile:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.json"
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40).tolist()
    prompts.write_text(json.dumps([ids]))
    target = capture(open_checkpoint(original), prompts.parent / "reference", prompts=prompts)
    return read_reference(target)


@pytest.fixture(scope="session")
def wrong_model(original: Path) -> Callable[[str], Path]:
    """A wrong model's folder, written once."""

    def make(wrong: str) -> Path:
        folder = original.parent / f"wrong-{list(WRONG_WEIGHTS).index(wrong)}"
        if not folder.exists():
            weights = sound_weights()
            changed = WRONG_WEIGHTS[wrong](CONFIG, weights)
            write_hugging_face(CONFIG, weights | changed, folder, dtype="bfloat16")
        return folder

    return make


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`validate --reference` as a machine without torch does it."""
    monkeypatch.setattr(opening, "find_spec", lambda name: None)

    def judge(path: Path, reference: ReferenceFile) -> Result:
        return validate_artifact(path, Request(reference=reference, max_tokens=8))

    return judge


def _factor(result: Result) -> float:
    """How many times its limit the value is that is farthest beyond it."""
    failed = [check for check in result.checks if check.outcome == "FAIL"]
    return max(check.value / check.limit if check.limit else 1.0 for check in failed)


@pytest.mark.parametrize("kind", map(case, ("onnx-int4", "onnx-int8", "coreml-int4", "gguf-int4")))
@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_a_reference_file_alone_finds_another_model(
    kind: str,
    wrong: str,
    wrong_model: Callable[[str], Path],
    reference: ReferenceFile,
    without_torch: Callable[..., Result],
) -> None:
    result = without_torch(export_once(kind, wrong_model(wrong)), reference)
    assert result.verdict == "FAIL" and result.twin is None
    assert _factor(result) > (3 if wrong in GROSS else 1.5)


@pytest.mark.parametrize("kind", map(case, QUANTIZED))
def test_the_right_one_passes(
    kind: str, original: Path, reference: ReferenceFile, without_torch: Callable
) -> None:
    path = export_once(kind, original)
    result = without_torch(path, reference)
    assert result.verdict == "PASS", [check for check in result.checks if not check.passed]


@pytest.mark.parametrize("kind", map(case, QUANTIZED))
def test_altered_weights_are_found_in_every_way(
    kind: str, original: Path, reference: ReferenceFile, tmp_path: Path
) -> None:
    """And the tensor is named."""
    checkpoint, sound = open_checkpoint(original), export_once(kind, original)
    for index, spoil in enumerate(SPOILED.values()):
        path = tmp_path / f"spoiled-{index}{sound.suffix}"
        (shutil.copyfile if sound.is_file() else shutil.copytree)(sound, path)
        spoil(path)
        result = validate_artifact(
            path, Request(model=str(original), reference=reference, max_tokens=16)
        )
        assert result.verdict == "FAIL"
        failed = [check for check in result.checks if check.outcome == "FAIL"]
        for place in ("weights", "reference"):
            named = {c.name.removeprefix(f"{place}.") for c in failed if c.name.startswith(place)}
            assert any(name.startswith(matrix_of(CONFIG)) for name in named), (place, failed)
        record = self_check(checkpoint, path)
        assert record.status == "unverified" and matrix_of(CONFIG) in record.reason


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_the_original_and_the_self_check_find_another_model(
    wrong: str, wrong_model: Callable[[str], Path], original: Path
) -> None:
    path = export_once("onnx-int4", wrong_model(wrong))
    result = validate_artifact(path, Request(model=str(original), max_tokens=16))
    assert result.verdict == "FAIL"
    assert _factor(result) > (3 if wrong in GROSS else 1.5)
    assert self_check(open_checkpoint(original), path).status == "unverified"
