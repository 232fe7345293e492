"""Artifacts of small random models, made by the exporter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.export.opening import open_artifact
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.ggml_library import load_library
from rgexport.quantize.scheme import Plan
from tests.models import Weights, random_weights, write_hugging_face

Made = tuple[Artifact, Weights]


def export_random(
    config: GriffinConfig,
    folder: Path,
    precision: str = "fp32",
    *,
    slowest: float = 1e-4,
    **options: Any,
) -> Made:
    """Exports a random model of shape `config`; returns the artifact and the original weights."""
    asked = OnnxOptions(precision=precision, **options)
    return _made(config, _target(folder, precision, options), slowest, export_onnx, asked)


def export_planned(
    config: GriffinConfig, folder: Path, plan: Plan, *, slowest: float = 1e-4, **options: Any
) -> Made:
    """The same by a plan."""
    asked = OnnxOptions(plan=plan, **options)
    return _made(config, _target(folder, "plan", options), slowest, export_onnx, asked)


def export_random_coreml(
    config: GriffinConfig,
    folder: Path,
    precision: str = "fp32",
    *,
    slowest: float = 1e-4,
    **options: Any,
) -> Made:
    """The same as a Core ML package."""
    pytest.importorskip("coremltools")
    asked = CoreMLOptions(precision=precision, **options)
    target = _target(folder, f"{precision}-coreml", options)
    return _made(config, target, slowest, export_coreml, asked)


def export_random_gguf(
    config: GriffinConfig, folder: Path, type: str = "f32", *, slowest: float = 1e-4, **options: Any
) -> Made:
    """The same as a GGUF file of a file type such as `q4_0`."""
    asked = GgufOptions(type=type, **options)
    target = folder / "-".join([f"{type}.gguf", *options])
    return _made(config, target, slowest, export_gguf, asked)


def _target(folder: Path, precision: str, options: dict[str, Any]) -> Path:
    return folder / "-".join([precision, *(f"{k}={v}" for k, v in options.items())])


def _made(
    config: GriffinConfig, target: Path, slowest: float, export: Callable[..., Path], asked: Any
) -> Made:
    weights = random_weights(config, slowest=slowest)
    model = target.parent / "model"
    if not model.exists():
        write_hugging_face(config, weights, model)
    if not target.exists():
        export(open_checkpoint(model), asked, target)
    return open_artifact(target), weights


def load_graph(artifact: Artifact) -> onnx.ModelProto:
    """The graph of an ONNX artifact, without its weights."""
    return onnx.load(str(artifact.path / "model.onnx"), load_external_data=False)


def require_ggml() -> None:
    """Skips a test that quantizes for llama.cpp, where the library for it is not installed."""
    try:
        load_library()
    except RequestError as error:
        pytest.skip(str(error))
