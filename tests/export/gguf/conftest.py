"""The demo model as GGUF."""

import pytest

from rgexport.export.gguf.artifact import GgufArtifact, open_gguf
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.griffin.checkpoint import open_checkpoint


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> GgufArtifact:
    """The bundled demo model, in f16."""
    target = tmp_path_factory.mktemp("demo") / "demo.gguf"
    return open_gguf(export_gguf(open_checkpoint(size="demo"), GgufOptions(type="f16"), target))
