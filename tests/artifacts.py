"""Artifacts of small random models, made by the exporter."""

from pathlib import Path
from typing import Any

from rgexport.export.artifact import Artifact
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.options import OnnxOptions
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.griffin.config import GriffinConfig
from tests.models import Weights, random_weights, write_hugging_face


def export_random(
    config: GriffinConfig,
    folder: Path,
    precision: str = "fp32",
    *,
    slowest: float = 1e-4,
    **options: Any,
) -> tuple[Artifact, Weights]:
    """Exports a random model of shape `config`; returns the artifact and the original weights."""
    weights = random_weights(config, slowest=slowest)
    model = folder / "model"
    if not model.exists():
        write_hugging_face(config, weights, model)
    target = folder / "-".join([precision, *(f"{k}={v}" for k, v in options.items())])
    asked = OnnxOptions(precision=precision, **options)
    return Artifact.open(export_onnx(open_checkpoint(model), asked, target)), weights
