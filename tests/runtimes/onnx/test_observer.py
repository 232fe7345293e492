"""ONNX Runtime's values at the sites against the step model."""

import sys
from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.export.onnx.artifact import DATA_FILE, MODEL_FILE
from rgexport.griffin.sites import sites
from rgexport.runtimes.engine import open_observer
from rgexport.runtimes.onnx.observer import OrtObserver, observed_graph
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random
from tests.models import ODD_CONFIGS
from tests.runtimes.site_oracle import begun, check_observer
from tests.sessions import distance

_SHAPES = ["wide_lru", "not_by_32", "hawk", "attention_tail", "attention_only"]


@pytest.mark.parametrize("name", _SHAPES)
def test_every_site_equals_the_step_model(name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, _ = export_random(config, tmp_path)
    observer = OrtObserver(artifact, threads=1)
    check_observer(artifact, OrtSession(artifact, threads=1), observer, set(sites(config)))


def test_quantized_weights_that_are_computed_exactly(tmp_path: Path) -> None:
    config = ODD_CONFIGS["not_by_32"]
    artifact, _ = export_random(config, tmp_path, "int4", exact=True)
    observer = OrtObserver(artifact, threads=1)
    check_observer(artifact, OrtSession(artifact, threads=1), observer, set(sites(config)))


@pytest.mark.parametrize(("precision", "halves"), [("int4", False), ("fp16", True)])
def test_rounded_values_say_their_dtype(precision: str, halves: bool, tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random(config, tmp_path, precision)
    session, observer = OrtSession(artifact, threads=1), OrtObserver(artifact, threads=1)
    state, tokens = begun(session, config)
    for length in observer.lengths:
        found = observer.observe(tokens[:length], state)
        assert found.values.keys() == set(sites(config))
        for site, value in found.values.items():
            assert value.dtype == np.float32 and value.shape[0] == length, site
            assert np.isfinite(value).all(), site
        assert ("layers.0.temporal_block.linear_x" in found.dtypes) is halves
        assert set(found.dtypes.values()) <= {"float16"}
        assert not found.dtypes.keys() & {"layers.0.temporal_residual", "embed_tokens", "logits"}
    session.set_state(state)
    session.prefill(tokens[None, :1])
    for name, array in session.get_state().items():
        # A session fuses ops that an observer cannot: without roundings to float16 between them, or
        # with other last bits of float32, which may round an activation to another int8 number.
        assert distance(found.state[name], array) <= 1e-2


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
