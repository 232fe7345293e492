"""Wrong models in the formats and precisions that users run, at default limits: none passes.

What is exported is a sound artifact of another model, or one of the right model whose stored
weights were altered. `bench.verdicts` asks the same of the demo, and of more formats.
"""

import json

import numpy as np
import pytest

from bench.wrong_models import SPOILED, WRONG_WEIGHTS, matrix_of
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.validate.opening import ValidationRequest
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import read_reference
from rgexport.validate.run import validate_artifact
from rgexport.validate.self_check import self_check
from tests.models import write_hugging_face
from tests.validate.faults.conftest import CONFIG, KINDS, case, export, sound_weights

QUANTIZED = [kind for kind in KINDS if "int" in kind]
GROSS = [name for name in WRONG_WEIGHTS if "times" not in name and "one tensor" not in name]
"""Those whose KL is above 1."""
QUICK = "one layer's matrices times 1.05", "two rows of one tensor exchanged"
"""Those that `make test` tries."""


@pytest.fixture(scope="session")
def reference(original, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.json"
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40).tolist()
    prompts.write_text(json.dumps([ids]))
    target = capture(open_checkpoint(original), prompts.parent / "reference", prompts=prompts)
    return read_reference(target)


@pytest.mark.parametrize("kind", map(case, QUANTIZED))
@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in SPOILED],
)
def test_altered_weights_are_found_in_every_way(fault, kind, original, copy, reference):
    """And the tensor is named; the right weights pass."""
    path, asked = copy(kind), {"reference": reference, "max_tokens": 16}
    sound = validate_artifact(path, ValidationRequest(reference=reference, max_tokens=8))
    assert sound.verdict == "PASS", [check for check in sound.checks if not check.passed]
    SPOILED[fault](path)
    result = validate_artifact(path, ValidationRequest(model=str(original), **asked))
    assert result.verdict == "FAIL"
    failed = [check.name for check in result.checks if check.outcome == "FAIL"]
    for place in ("weights", "reference"):
        assert any(name.startswith(f"{place}.{matrix_of(CONFIG)}") for name in failed), failed
    record = self_check(open_checkpoint(original), path)
    assert record.status == "unverified" and matrix_of(CONFIG) in record.reason


@pytest.mark.parametrize(
    "wrong",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in WRONG_WEIGHTS],
)
def test_another_model_is_found_in_every_way(wrong, original, reference, tmp_path):
    """By the original, by the self-check, and by a reference file alone."""
    weights = sound_weights()
    weights |= WRONG_WEIGHTS[wrong](CONFIG, weights)
    model = write_hugging_face(CONFIG, weights, tmp_path / "model", dtype="bfloat16")
    path = export("onnx-int4", open_checkpoint(model), tmp_path / "artifact")
    alone = validate_artifact(path, ValidationRequest(reference=reference, max_tokens=8))
    result = validate_artifact(path, ValidationRequest(model=str(original), max_tokens=16))
    for found in (alone, result):
        failed = [check for check in found.checks if check.outcome == "FAIL"]
        factors = [check.value / check.limit if check.limit else 1.0 for check in failed]
        assert found.verdict == "FAIL" and max(factors) > (3 if wrong in GROSS else 1.5)
    assert self_check(open_checkpoint(original), path).status == "unverified"
