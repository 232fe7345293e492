"""Text sampled from a model: how it begins, and that it is the model's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rgexport.chat.sampling import Sampler
from rgexport.chat.tokenizer import load_tokenizer
from rgexport.compress import sampling
from rgexport.compress.passages import LENGTH
from rgexport.griffin.checkpoint import demo_folder
from rgexport.griffin.reference import Reference
from tests.compress.collected import checkpoint_of
from tests.models import random_weights, weight_source

COUNT = 70


def test_sequences_begin_with_a_bos_and_an_ordinary_token() -> None:
    tokenizer = load_tokenizer(demo_folder())
    found = sampling.first_tokens(tokenizer, 8192, 3000, np.random.default_rng(0))
    assert found.shape == (3000, 2) and set(found[:, 0]) == {tokenizer.bos_id}
    assert not set(found[:, 1]) & set(tokenizer.special.values())
    assert len(set(found[:, 1])) > 2000 and found.max() < 8192


def test_without_a_tokenizer_any_token_begins() -> None:
    found = sampling.first_tokens(None, 50, 2000, np.random.default_rng(0))
    assert found.shape == (2000, 1) and set(found[:, 0]) == set(range(50))


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_each_token_is_drawn_from_the_models_distribution(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn at a temperature near 0: each token is then the reference's first choice."""
    monkeypatch.setattr(
        sampling, "Sampler", lambda options: Sampler(replace(options, temperature=1e-6))
    )
    if precision == "int4":
        monkeypatch.setattr(sampling, "_LARGEST_IN_FLOAT32", 0)
    checkpoint = checkpoint_of("wide_lru", tmp_path / "model")
    (found,) = sampling.sample(checkpoint, None, COUNT, seed=0, folder=tmp_path / "sampled")
    assert len(found) == COUNT and not (tmp_path / "sampled").exists()
    config = checkpoint.config
    reference = Reference(config, weight_source(random_weights(config)))
    logits = reference.logits(reference.run(found[None, :-1])[0])[0]
    chosen = (logits.argmax(1) == found[1:]).mean()
    assert chosen == 1 if precision == "fp32" else chosen > 0.5


def test_a_text_has_as_many_tokens_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_BATCH", 2)
    monkeypatch.setattr(sampling, "LENGTH", 24)
    checkpoint = checkpoint_of("regular", tmp_path / "model")
    assert checkpoint.config.window < 24 < LENGTH
    found = sampling.sample(checkpoint, None, COUNT, seed=3, folder=tmp_path / "a")
    again = sampling.sample(checkpoint, None, COUNT, seed=3, folder=tmp_path / "b")
    other = sampling.sample(checkpoint, None, COUNT, seed=4, folder=tmp_path / "c")
    assert [len(s) for s in found] == [24, 24, 22]
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(found, other, strict=True))
