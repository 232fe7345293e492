"""A small artifact with weights in several schemes."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.gguf.format import GgufArtifact, open_gguf
from rgexport.quantize.plan import make_plan
from rgexport.quantize.schemes.registry import Affine
from tests.artifacts import export_demo, export_random
from tests.models import Weights, make_config

CONFIG = make_config(
    "ra", width=24, heads=2, head_dim=8, mlp_width=48, lru_width=32, vocab_size=40, window=8
)


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Weights]:
    """An artifact with linears in int4 and the embedding in int8, and the original weights."""
    plan = make_plan(CONFIG, Affine(4, 32, symmetric=False), Affine(8, 32, symmetric=True))
    return export_random(CONFIG, tmp_path_factory.mktemp("planned"), None, plan=plan)


@pytest.fixture
def made(planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The folder of a copy of it, whose files nobody has hashed; its manifest and weights."""
    artifact, weights = planned
    folder = Path(shutil.copytree(artifact.path, tmp_path / "plan"))
    monkeypatch.setenv("RGEXPORT_CACHE", str(tmp_path / "cache"))
    return SimpleNamespace(folder=folder, manifest=artifact.manifest, weights=weights)


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> GgufArtifact:
    target = tmp_path_factory.mktemp("demo") / "demo.gguf"
    export_demo(target, "gguf", "--type", "f16", "--no-check")
    return open_gguf(target)
