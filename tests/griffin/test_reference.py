"""The torch reference against DeepMind's implementation."""

import numpy as np
import pytest
import torch

from rgexport.griffin.reference import Reference
from rgexport.griffin.state import POSITION
from tests.deepmind import deepmind_logits, deepmind_model
from tests.models import ODD_CONFIGS, random_weights, weight_source


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_reference_equals_deepmind(name: str) -> None:
    config = ODD_CONFIGS[name]
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 4 * config.window + 5))
    expected = deepmind_logits(deepmind_model(config, weights), tokens)

    reference = Reference(config, weight_source(weights))
    hidden, _ = reference.run(tokens)

    assert np.abs(reference.logits(hidden) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["wide_lru", "irregular"])
def test_reference_continues_from_a_state(name: str) -> None:
    config = ODD_CONFIGS[name]
    reference = Reference(config, weight_source(random_weights(config)))
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 3 * config.window))
    cut = config.window + 7

    whole, after_whole = reference.run(tokens)
    _, before = reference.run(tokens[:, :cut])
    rest, after_rest = reference.run(tokens[:, cut:], before)

    assert (rest - whole[:, cut:]).abs().max() <= 1e-5 * whole.abs().max()
    assert after_rest[POSITION].tolist() == [tokens.shape[1]] * 2
    for state, array in after_whole.items():
        np.testing.assert_allclose(after_rest[state], array, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu() -> None:
    config = ODD_CONFIGS["wide_lru"]
    source = weight_source(random_weights(config))
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (2, 600))
    found = {}
    for device in ("cpu", "cuda"):
        reference = Reference(config, source, device=device)
        found[device] = reference.logits(reference.run(tokens)[0])
    assert np.abs(found["cuda"] - found["cpu"]).max() <= 1e-4 * np.abs(found["cpu"]).max()
