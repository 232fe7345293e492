"""A small package, exported once; tests that harm it take a copy."""

import shutil
from pathlib import Path

import pytest

from rgexport.export.artifact import Artifact
from tests.artifacts import export_random_coreml
from tests.models import Weights, make_config

CONFIG = make_config("rra", width=64, heads=2, lru_width=96, mlp_width=128, window=8)


@pytest.fixture(scope="package")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Weights]:
    """An int4 package with an int8 embedding, and the weights that went into it."""
    folder = tmp_path_factory.mktemp("coreml")
    return export_random_coreml(CONFIG, folder, "int4", prefill_length=5)


@pytest.fixture
def copied(exported: tuple[Artifact, Weights], tmp_path: Path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(exported[0].path, tmp_path / "copy"))
