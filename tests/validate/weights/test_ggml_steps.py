"""The steps of ggml's types: what ggml stores passes, a wrong scale does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.export.manifest import StoredTensor
from rgexport.quantize.scheme import Ggml
from rgexport.validate.weights.ggml_steps import BLOCKS, decay_steps
from rgexport.validate.weights.steps import shown_rounding
from tests.llama_tools import needs_llama_cpp
from tests.validate.weights.stored import complaints, draw, error_of, passes, store

WEIGHTS = ("normal", "uniform", "heavy", "columns of all sizes", "loud columns", "zeros")
FOUR_BITS_OR_MORE = [kind for kind in BLOCKS if kind != "q2_k"]


@needs_llama_cpp
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["f16", "bf16", *BLOCKS]),
    weights=st.sampled_from(WEIGHTS),
    size=st.floats(1e-2, 1e2),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_ggml_stores_passes(kind, weights, size, weighted, seed):
    w = draw(weights, (64, 512), size=size, seed=seed)
    rng = np.random.default_rng(seed)
    importance = np.exp(rng.normal(size=512)).astype(np.float32) if weighted else None
    stored = store(w, Ggml(kind), importance=importance)
    assert complaints(w, stored, Ggml(kind), weighted) == []


@needs_llama_cpp
@pytest.mark.parametrize("kind", FOUR_BITS_OR_MORE)
@pytest.mark.parametrize("size", [1.0, 0.02, 0.005])
def test_a_wrong_scale_or_block_is_seen(kind, size):
    """A scale off by three percent, which hides in the noise of four bits.

    The noise of two bits is 30 %, and the least squared error alone makes scales 2 to 6 % smaller.
    """
    w, scheme = draw("normal", (64, 512), size=size), Ggml(kind)
    assert passes(error_of(w, store(w, scheme), scheme))
    for gain in (0.97, 1.03):
        assert not passes(error_of(w, store(w, scheme, gain), scheme))
    block = store(w, scheme).copy()
    block[7, 256:512] = np.roll(block[7, 256:512], 1)
    assert not passes(error_of(w, block, scheme))


@needs_llama_cpp
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-5, 5e-5, 3e-4])
def test_neurons_that_are_almost_zero_pass(kind, size):
    """Their scales are too small for float16, with the weights or with a sketch of them."""
    w, scheme = draw("normal", (64, 512)), Ggml(kind)
    w[::16] *= size
    stored = store(w, scheme)
    assert passes(error_of(w, stored, scheme))
    noise, _ = shown_rounding("w", stored, StoredTensor(w.shape, scheme, {}))
    assert (np.square(stored - w).sum(1) / noise).max() < 6


def test_steps_of_decays():
    """They are stored through softplus, in float32: half a step at most."""
    decay = np.random.default_rng(3).uniform(-12, 2, 4000).astype(np.float32)
    stored = (-8 * np.logaddexp(0, decay.astype(np.float64))).astype(np.float32)
    back = np.log(np.expm1(stored.astype(np.float64) / -8)).astype(np.float32)
    assert 0.1 < (np.abs(back - decay) / decay_steps(decay)).max() <= 0.501
