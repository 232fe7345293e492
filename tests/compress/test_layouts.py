"""The bytes that layouts and artifacts are said to take, beside those that exports write."""

import numpy as np
import pytest

from rgexport.compress.items import items_of, plan_of
from rgexport.compress.layouts import layouts_of
from rgexport.errors import RequestError
from rgexport.export.coreml.exporter import CoreMLOptions, export_coreml
from rgexport.export.gguf.exporter import GgufOptions, export_gguf
from rgexport.export.onnx.exporter import OnnxOptions, export_onnx
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize.scheme import Ggml
from rgexport.quantize.statistics import statistics_of

pytestmark = pytest.mark.full
EXPORTS = {
    "onnx": (OnnxOptions, export_onnx),
    "coreml": (CoreMLOptions, export_coreml),
    "gguf": (GgufOptions, export_gguf),
}


def unit_statistics(name):
    columns = 768 if "down_proj" in name else 256
    return statistics_of([np.eye(columns, dtype=np.float32)], 1000)


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_artifact_is_as_large_as_predicted(kind, tmp_path):
    checkpoint = open_checkpoint(size="demo")
    layouts = layouts_of(kind)
    rows = np.random.default_rng(0).random(8192) if layouts.row_groups else None
    items = items_of(checkpoint.config, rows)
    options = [list(layouts.options(item.shape)) for item in items]
    plan = plan_of(checkpoint.config, items, [own[i % len(own)] for i, own in enumerate(options)])
    asked, export = EXPORTS[kind]
    target = tmp_path / "artifact"
    export(checkpoint, asked(plan=plan), target, statistics=unit_statistics)
    files = [target, *target.rglob("*")] if target.is_dir() else [target]
    written = sum(path.stat().st_size for path in files if path.is_file())
    assert layouts.artifact_bytes(plan, checkpoint) == pytest.approx(written, rel=0.005)


def test_options_of_a_matrix():
    assert {one.label for one in layouts_of("onnx").options((256, 256))} >= {
        *("int4/128", "int4/64", "int4/32", "int4/16", "int4/32 asym", "int8/128", "int8/32")
    }
    # Core ML has no blocks that do not divide a row, and each layout is there once.
    narrow = [one.label for one in layouts_of("coreml").options((40, 24))]
    assert len(narrow) == len(set(narrow)) and "int4/128" not in narrow
    # k-quants have blocks of 256 weights.
    assert Ggml("q4_k") in layouts_of("gguf").options((64, 512))
    assert Ggml("q4_k") not in layouts_of("gguf").options((64, 288))
    assert layouts_of("onnx").options((256, 256))[
        next(one for one in layouts_of("onnx").options((256, 256)) if one.label == "int4/32")
    ] == 256 * (128 + 8 * 2)


def test_an_unknown_format_is_refused():
    with pytest.raises(RequestError, match="--format is 'tflite'; expected one of onnx, coreml"):
        layouts_of("tflite")
