"""The step_sizes of ggml's types: what ggml stores passes, a wrong scale does not."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.export.manifest import StoredTensor
from rgexport.griffin.tensor import from_array
from rgexport.quantize.ggml_library import quantize_rows
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme import Ggml
from rgexport.validate.weights.ggml_steps import BLOCKS, decay_steps, norm_steps
from rgexport.validate.weights.weight_errors import WeightError, weight_errors
from rgexport.validate.weights.weight_limits import weight_checks
from tests.llama_tools import needs_llama_cpp

KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy": lambda rng, shape: rng.standard_t(3, shape),
    "columns of all sizes": lambda rng, shape: (
        rng.normal(size=shape) * np.exp(rng.normal(size=(1, shape[1])))
    ),
    "loud columns": lambda rng, shape: (
        rng.normal(size=shape) * np.where(np.arange(shape[1]) % 64, 1, 20)
    ),
}


def _stored(w: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Ŵ, by ggml's quantizer and gguf-py's dequantizer."""
    rows = quantize_rows(w, kind, importance)
    return quants.dequantize(rows, GGMLQuantizationType(TYPES[kind].value))


def _error(w: np.ndarray, twin: np.ndarray, kind: str, weighted: bool = False) -> WeightError:
    tensors = {"w": StoredTensor(w.shape, Ggml(kind), {})}
    sources = ({"w": from_array(array.astype(np.float32))} for array in (w, twin))
    return weight_errors(*sources, tensors, weighted=weighted)[0]


def _passes(error: WeightError) -> bool:
    return all(check.passed for check in weight_checks([error]))


@needs_llama_cpp
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["f16", "bf16", *BLOCKS]),
    weights=st.sampled_from(list(KINDS)),
    size=st.floats(1e-2, 1e2),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_ggml_stores_is_never_suspected(
    kind: str, weights: str, size: float, weighted: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = (size * KINDS[weights](rng, (64, 512))).astype(np.float32)
    importance = np.exp(rng.normal(size=512)).astype(np.float32) if weighted else None
    error = _error(w, _stored(w, kind, importance), kind, weighted)
    assert _passes(error), list(weight_checks([error]))


@needs_llama_cpp
@pytest.mark.parametrize("gain", [0.97, 1.03])
@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "q2_k"])
def test_a_wrong_scale_is_seen(kind: str, gain: float) -> None:
    """Of three percent, which hides in the noise of four bits.

    That of two bits is 30 %, and by the least squared error alone a scale is 2 to 6 % too small.
    """
    w = np.random.default_rng(1).normal(size=(64, 512)).astype(np.float32)
    assert _passes(_error(w, _stored(w, kind), kind))
    assert not _passes(_error(w, gain * _stored(w, kind), kind))


@needs_llama_cpp
@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind != "q2_k"])
def test_one_wrong_block_is_seen(kind: str) -> None:
    w = np.random.default_rng(2).normal(size=(64, 512)).astype(np.float32)
    twin = _stored(w, kind).copy()
    twin[7, 256:512] = np.roll(twin[7, 256:512], 1)
    assert not _passes(_error(w, twin, kind))


def test_what_is_stored_as_something_else() -> None:
    """Norms with 1 added and decays through softplus, in float32: half a step at most."""
    rng = np.random.default_rng(3)
    norm = (0.3 * rng.normal(size=4000)).astype(np.float32)
    restored = (norm + np.float32(1)) - np.float32(1)
    assert 0.1 < (np.abs(restored - norm) / norm_steps(norm)).max() <= 0.501
    decay = rng.uniform(-12, 2, 4000).astype(np.float32)
    stored = (-8 * np.logaddexp(0, decay.astype(np.float64))).astype(np.float32)
    back = np.log(np.expm1(stored.astype(np.float64) / -8)).astype(np.float32)
    assert 0.1 < (np.abs(back - decay) / decay_steps(decay)).max() <= 0.501
