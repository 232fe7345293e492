"""What the interpreter computes at the sites of a Core ML package against the step model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.package import PACKAGE
from rgexport.export.mil.package import open_package
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.sites import HEAD_SITES, sites
from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner
from rgexport.runtimes.coreml.observer import CoreMLObserver
from rgexport.runtimes.coreml.session import CoreMLSession
from rgexport.runtimes.engine import open_observer
from tests.artifacts import export_random_coreml
from tests.models import ODD_CONFIGS
from tests.runtimes.site_oracle import begun, check_observer

_SHAPES = [
    *((name, "io") for name in ("wide_lru", "not_by_32", "attention_tail", "attention_only")),
    ("hawk", "hilo"),
]


def _session(artifact: Artifact) -> CoreMLSession:
    runner = InterpreterRunner(open_package(artifact.file(PACKAGE)))
    return CoreMLSession(artifact, runner=runner)


def _shown(config: GriffinConfig) -> set[str]:
    """The choice of all tokens is no value of its own."""
    return set(sites(config)) - {"last_tokens"}


@pytest.mark.parametrize(("name", "recurrent_state"), _SHAPES)
def test_every_site_equals_the_step_model(name: str, recurrent_state: Any, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, _ = export_random_coreml(
        config, tmp_path, prefill_length=16, all_logits=True, recurrent_state=recurrent_state
    )
    observer = CoreMLObserver(artifact)
    assert observer.lengths == (16, 1)
    found = check_observer(artifact, _session(artifact), observer, _shown(config))
    assert not any(o.dtypes or o.gates for o in found)


def test_a_prefill_without_all_logits_shows_the_head_of_its_last_token(tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random_coreml(config, tmp_path, prefill_length=8)
    observer = CoreMLObserver(artifact)
    whole, single = check_observer(artifact, _session(artifact), observer, _shown(config))
    assert whole.values.keys() == set(sites(config)) and len(whole.values["embed_tokens"]) == 8
    assert all(len(whole.values[site]) == 1 for site in HEAD_SITES)
    assert "last_tokens" not in single.values


@pytest.mark.parametrize("precision", ["fp16", "int4", "pal4"])
def test_it_computes_what_a_session_computes(precision: str, tmp_path: Path) -> None:
    """In float16 where the package does, to the last bit."""
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random_coreml(config, tmp_path, precision, prefill_length=8)
    session, observer = _session(artifact), open_observer(artifact)
    state, tokens = begun(session, config)
    for length in observer.lengths:
        found = observer.observe(tokens[:length], state)
        assert found.values.keys() >= _shown(config)
        assert set(found.dtypes.values()) == {"float16"}
        assert {"layers.0.temporal_block.linear_x", "lm_head"} <= found.dtypes.keys()
        assert not found.dtypes.keys() & {"layers.0.temporal_block.rg_lru", "final_norm", "logits"}
        session.set_state(state)
        logits = session.prefill(tokens[None, :length])
        np.testing.assert_array_equal(found.values["logits"][-1:], logits[0])
        for name, array in session.get_state().items():
            np.testing.assert_array_equal(found.state[name], array)
