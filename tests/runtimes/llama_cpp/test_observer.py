"""llama.cpp's values at the sites against the step model, and its names for them."""

from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.runtimes.llama_cpp import observer as llama_cpp_observer
from rgexport.runtimes.llama_cpp.observer import LlamaCppObserver
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from tests.artifacts import export_random_gguf
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS
from tests.runtimes.test_observation import begun

pytestmark = needs_llama_cpp


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
