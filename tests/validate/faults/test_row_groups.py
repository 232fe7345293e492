"""Faults in the row groups of whole artifacts, whose hashes fit: each is found, and named."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bench.wrong_models import _fit_hashes
from rgexport.export.artifact import Artifact
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.manifest_reader import read_manifest
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.layout import EMBEDDING
from rgexport.validate.self_check import self_check
from tests.row_groups import split_plan
from tests.validate.faults.conftest import CONFIG, Copy

FORMATS = ["onnx", pytest.param("coreml", marks=pytest.mark.full)]
PLAN = split_plan(CONFIG)


@pytest.fixture(scope="module")
def sound(original) -> Copy:
    """The sound artifact of a format, exported once."""

    def export(kind: str) -> Path:
        target = original.with_name(f"row-groups-{kind}")
        if not target.exists() and kind == "onnx":
            export_onnx(open_checkpoint(original), OnnxOptions(plan=PLAN), target)
        elif not target.exists():
            pytest.importorskip("coremltools")
            options = CoreMLOptions(plan=PLAN, prefill_length=8)
            export_coreml(open_checkpoint(original), options, target)
        return target

    return export


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sound_artifact_passes(kind, sound, original, judge):
    result = judge(sound(kind))
    assert result.verdict == "PASS", [check for check in result.checks if not check.passed]
    table = [e.scheme for e in result.weights if e.name == EMBEDDING]
    assert len(table) == 3 and "(60 rows)" in table[0]
    assert self_check(open_checkpoint(original), sound(kind)).status == "verified"


def test_rows_whose_order_is_not_restored_are_found(sound, judge, tmp_path):
    """The graph takes rows for its own that are another's: only running it shows that."""
    path = Path(shutil.copytree(sound("onnx"), tmp_path / "onnx"))
    model = onnx.load(str(path / "model.onnx"), load_external_data=False)
    (places,) = (
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT32 and list(tensor.dims) == [CONFIG.vocab_size]
    )
    places.CopyFrom(numpy_helper.from_array(np.arange(300, dtype=np.int32), places.name))
    onnx.save(model, str(path / "model.onnx"))
    _fit_hashes(Artifact(path, read_manifest(path)))
    result = judge(path)
    assert result.verdict == "FAIL"
    assert {"embed_tokens", "lm_head"} & {suspect.site for suspect in result.suspects}
