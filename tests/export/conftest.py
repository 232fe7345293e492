"""A small artifact with weights in several schemes."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rgexport.export.manifest import Manifest
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.plan import make_plan
from rgexport.quantize.scheme import Affine
from tests.artifacts import export_planned
from tests.models import Weights

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


@dataclass
class Made:
    """An artifact's folder, its manifest and the weights that went into it."""

    folder: Path
    manifest: Manifest = field(repr=False)
    weights: Weights = field(repr=False)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A complete artifact, linears in int4, embedding in int8, whose files nobody has hashed."""
    plan = make_plan(CONFIG, Affine(4, 32, symmetric=False), Affine(8, 32, symmetric=True))
    artifact, weights = export_planned(CONFIG, tmp_path, plan)
    monkeypatch.setenv("RGEXPORT_CACHE", str(tmp_path / "cache"))
    return Made(artifact.path, artifact.manifest, weights)
