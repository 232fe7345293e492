"""The divergence of two models, beside that of their whole logits in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rgexport.compress.measure import Original, _Sums
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, random_weights, weight_source


def log_softmax(logits):
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def divergences(original, other):
    p, q = log_softmax(original), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.floats(0.1, 300),
    st.integers(0, 2**32 - 1),
)
def test_sums_over_slabs_are_those_over_all(tokens, slabs, size, seed):
    rng = np.random.default_rng(seed)
    original, other = size * rng.normal(size=(2, tokens, sum(slabs)))
    sums, start = _Sums(tokens), 0
    for count in slabs:
        part = slice(start, start + count)
        sums.add(torch.from_numpy(original[:, part]), torch.from_numpy(other[:, part]))
        start += count
    wanted = divergences(original, other)
    np.testing.assert_allclose(sums.divergences(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_as_deepminds_model(name, monkeypatch):
    config = ODD_CONFIGS[name]
    monkeypatch.setattr("rgexport.compress.measure._SLAB_BYTES", 100 * 4 * config.width)
    weights = random_weights(config)
    rng = np.random.default_rng(1)
    others = {n: w + 0.02 * w.std() * rng.normal(size=w.shape) for n, w in weights.items()}
    others = {n: w.astype(np.float32) for n, w in others.items()}
    texts = [rng.integers(0, config.vocab_size, length) for length in (20, 7, 20)]
    found = Original(config, weight_source(weights), texts).divergence(weight_source(others))
    models = [deepmind_model(config, w) for w in (weights, others)]
    wanted = [
        divergences(*(deepmind_logits(model, text[None])[0] for model in models)) for text in texts
    ]
    assert found.tokens == 47
    assert found.kl == pytest.approx(np.concatenate(wanted).mean(), rel=1e-3)


def test_the_error_is_that_of_sequences_as_wholes():
    config = ODD_CONFIGS[next(iter(ODD_CONFIGS))]
    weights = random_weights(config)
    others = {n: (w * 1.01).astype(np.float32) for n, w in weights.items()}
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, config.vocab_size, 12) for _ in range(5)]
    found = Original(config, weight_source(weights), texts).divergence(weight_source(others))
    alone = [
        Original(config, weight_source(weights), [t]).divergence(weight_source(others))
        for t in texts
    ]
    means = np.array([one.kl for one in alone])
    assert found.error == pytest.approx(means.std(ddof=1) / 5**0.5, rel=1e-3)
    assert math.isnan(alone[0].error)
