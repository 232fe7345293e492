"""ONNX Runtime's values at the sites against the step model."""

import sys
from pathlib import Path

import pytest

from rgexport.errors import RequestError
from rgexport.export.onnx.artifact import DATA_FILE, MODEL_FILE
from rgexport.griffin.sites import sites
from rgexport.runtimes.engine import open_observer
from rgexport.runtimes.onnx.observer import observed_graph
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS


def test_the_weights_are_read_where_they_lie(tmp_path: Path) -> None:
    """Only the graph is loaded: without the file of weights it cannot be opened."""
    artifact, _ = export_random(ODD_CONFIGS["regular"], tmp_path)
    graph, names = observed_graph(artifact.file(MODEL_FILE), sites(artifact.manifest.config))
    assert len(names) > 40 and len(graph) < artifact.file(DATA_FILE).stat().st_size / 2
    artifact.file(DATA_FILE).rename(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="cannot open"):
        OrtSession(artifact, graph=graph)


def test_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact, _ = export_random(ODD_CONFIGS["attention_only"], tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RequestError, match=r"pip install 'rgexport\[export\]'"):
        open_observer(artifact)
