"""A small artifact that no exporter made: a manifest, and weights in one data file."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from rgexport.export.artifact import record_files
from rgexport.export.manifest import (
    IoRecord,
    Manifest,
    Source,
    StoredPart,
    StoredTensor,
    write_manifest,
)
from rgexport.export.onnx.format import OnnxFormat
from rgexport.export.onnx.model_file import DTYPES
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import model_tensors
from rgexport.quantize import affine
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine, Scheme

CONFIG = GriffinConfig(
    vocab_size=40,
    width=24,
    mlp_width=48,
    lru_width=32,
    lru_heads=2,
    num_heads=2,
    head_dim=8,
    block_types=("recurrent", "attention"),
    window=8,
    rope_dims=4,
)


@dataclasses.dataclass
class Made:
    """An artifact's folder, its manifest and the weights that went into it."""

    folder: Path
    manifest: Manifest = dataclasses.field(repr=False)
    weights: dict[str, np.ndarray] = dataclasses.field(repr=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the memory of verified files out of the user's own."""
    monkeypatch.setenv("RGEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A complete artifact in `tmp_path/artifact`, linears in int4, embedding in int8."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    plan = make_plan(CONFIG, Affine(4, 32, symmetric=False), Affine(8, 32, symmetric=True))
    random = np.random.default_rng(0)
    weights, tensors = {}, {}
    with open(folder / "model.onnx.data", "wb") as data:
        for name, spec in model_tensors(CONFIG).items():
            weights[name] = random.standard_normal(spec.shape).astype(np.float32)
            parts = {}
            for label, rows in _encode(weights[name], plan[name]).items():
                shape = tuple(rows.shape)
                parts[label] = StoredPart("model.onnx.data", data.tell(), rows.dtype.name, shape)
                data.write(rows.tobytes())
            tensors[name] = StoredTensor(spec.shape, plan[name], parts)
    manifest = Manifest(
        name="small",
        created_with={"rgexport": "0"},
        source=Source("hugging-face", "small", {}),
        config=CONFIG,
        precision="int4",
        compute="fp32",
        exact=False,
        plan=plan,
        tensors=tensors,
        states=(),
        io=IoRecord((), ()),
        instruction_tuned=False,
        files={},
    )
    states, io = OnnxFormat().interface(manifest)
    write_empty_graph(io, folder / "model.onnx")
    manifest = dataclasses.replace(manifest, states=states, io=io, files=record_files(folder))
    write_manifest(folder, manifest)
    return Made(folder, manifest, weights)


def write_empty_graph(io: IoRecord, path: Path) -> None:
    """Writes a model that has these inputs and outputs, and nothing else."""
    numbers = {dtype: number for number, dtype in DTYPES.items()}
    inputs, outputs = (
        [helper.make_tensor_value_info(v.name, numbers[v.dtype], v.shape) for v in values]
        for values in (io.inputs, io.outputs)
    )
    onnx.save(helper.make_model(helper.make_graph([], "empty", inputs, outputs)), path)


def _encode(rows: np.ndarray, scheme: Scheme) -> affine.Parts:
    if isinstance(scheme, Affine):
        return affine.encode(rows, scheme)
    return {"data": rows}
