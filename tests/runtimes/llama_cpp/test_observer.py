"""llama.cpp's values at the sites against the step model, and its names for them."""

from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.sites import sites
from rgexport.runtimes.engine import open_observer
from rgexport.runtimes.llama_cpp import observer as llama_cpp_observer
from rgexport.runtimes.llama_cpp.observer import LlamaCppObserver
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from tests.artifacts import export_random_gguf, require_ggml
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS
from tests.runtimes.site_oracle import begun, check_observer

pytestmark = needs_llama_cpp

_SHAPES = ["wide_lru", "not_by_32", "hawk", "attention_tail", "attention_only"]


def _shown(config: GriffinConfig) -> set[str]:
    """All sites but the GELUs and the last tokens: it fails if llama.cpp renames a tensor."""
    return {site for site in sites(config) if not site.endswith((".gelu", "last_tokens"))}


@pytest.mark.parametrize("name", _SHAPES)
def test_every_site_equals_the_step_model(name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, _ = export_random_gguf(config, tmp_path)
    observer = LlamaCppObserver(artifact, threads=1)
    session = LlamaCppSession(artifact, threads=1)
    for found in check_observer(artifact, session, observer, _shown(config)):
        assert found.values.keys() | found.gates.keys() == _shown(config)
        assert all(site.endswith("_gate") for site in found.gates) and not found.dtypes


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_it_computes_what_a_session_computes(kind: str, tmp_path: Path) -> None:
    """With its own settings, such as flash attention and a cache in float16, to the last bit."""
    require_ggml()
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random_gguf(config, tmp_path, kind)
    session = LlamaCppSession(artifact, threads=1)
    observer = open_observer(artifact, threads=1)
    state, tokens = begun(session, config)
    for length in observer.lengths:
        found = observer.observe(tokens[:length], state)
        assert found.values.keys() | found.gates.keys() == _shown(config)
        assert found.dtypes == {"layers.2.temporal_block.attention": "float16"}
        session.set_state(state)
        logits = session.prefill(tokens[None, :length], length)
        np.testing.assert_array_equal(found.values["logits"], logits[0])
        for name, array in session.get_state().items():
            np.testing.assert_array_equal(found.state[name], array)


@pytest.mark.parametrize("error", [RequestError("a tensor has gaps"), KeyboardInterrupt()])
def test_what_goes_wrong_inside_llama_cpp_is_raised_outside(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ODD_CONFIGS["hawk"]
    artifact, _ = export_random_gguf(config, tmp_path)
    observer = LlamaCppObserver(artifact, threads=1)
    state, tokens = begun(LlamaCppSession(artifact, threads=1), config)

    def fail(tensor: int) -> np.ndarray:
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(llama_cpp_observer, "read_floats", fail)
        observer.observe(tokens[:1], state)
    assert observer.observe(tokens[:1], state).values.keys() > {"embed_tokens", "logits"}


@pytest.mark.parametrize(("contiguous", "size"), [(True, 12), (False, 24)])
def test_other_types_and_gaps_are_refused(
    contiguous: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        "ggml_get_name": b"half",
        "ggml_nelements": 6,
        "ggml_nbytes": size,
        "ggml_is_contiguous": contiguous,
    }
    fakes = {name: lambda tensor, value=value: value for name, value in found.items()}
    monkeypatch.setattr(llama_cpp_observer, "_functions", lambda: fakes)
    with pytest.raises(RequestError, match=f"half has 6 elements in {size} bytes; expected float"):
        llama_cpp_observer.read_floats(1)
