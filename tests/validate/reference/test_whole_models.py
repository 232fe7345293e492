"""Other packages' implementations against the project's own reference."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.reference import Reference
from rgexport.griffin.state import State, zero_state
from rgexport.validate.reference.whole_model import WholeModel
from tests.models import ODD_CONFIGS, random_weights, weight_source

IMPLEMENTATIONS = "deepmind", "hf"


def make(name: str, config: GriffinConfig) -> tuple[WholeModel, Reference]:
    """One of them, and the project's own for the same configuration."""
    source = weight_source(random_weights(config))
    model: Any
    if name == "hf":
        pytest.importorskip("transformers")
        from rgexport.validate.reference.hugging_face_model import HuggingFaceModel

        model = HuggingFaceModel(config, source)
    else:
        from rgexport.validate.reference.deepmind_model import DeepMindModel

        model = DeepMindModel(config, source)
    return model, Reference(model.config, source)


def tokens_of(config: GriffinConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, config.vocab_size, shape)


def assert_same_state(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert theirs[name].shape == array.shape and theirs[name].dtype == array.dtype, name
        np.testing.assert_allclose(theirs[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *(("deepmind", shape) for shape in ODD_CONFIGS),
        *(("hf", shape) for shape in ODD_CONFIGS if shape != "hawk"),
    ],
)
def test_it_gives_the_logits_and_states_of_our_own(name, shape):
    model, own = make(name, ODD_CONFIGS[shape])
    tokens = tokens_of(own.config, 1, 3 * own.config.window + 5)
    (theirs, after), (ours, expected) = model.run(tokens), own.run(tokens)
    logits = own.logits(ours)
    assert np.abs(model.logits(theirs) - logits).max() <= 2e-5 * np.abs(logits).max()
    assert_same_state(expected, after)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["wide_lru", "attention_tail", "irregular"])
@pytest.mark.parametrize("length", [1, 2, 5, 15, 16, 40])
def test_it_goes_on_from_a_state(name, shape, length):
    """From one of our own, and each row of a batch from its own position."""
    model, own = make(name, ODD_CONFIGS[shape])
    texts = [tokens_of(own.config, 1, count) for count in (length, length + 3)]
    before = [own.run(text)[1] for text in texts]
    state = {key: np.concatenate([found[key] for found in before]) for key in before[0]}
    following = tokens_of(own.config, 2, 3)
    untouched = {key: array.copy() for key, array in state.items()}
    (theirs, after), (ours, expected) = model.run(following, state), own.run(following, state)
    assert all(np.array_equal(state[key], array) for key, array in untouched.items())
    logits = own.logits(ours)
    assert np.abs(model.logits(theirs) - logits).max() <= 2e-5 * np.abs(logits).max()
    assert_same_state(expected, after)
    assert [int(p) for p in state["position"]] == [length, length + 3]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepmind", {"lru_heads": 2}),
        ("deepmind", {"rope_theta": 5000.0}),
        ("deepmind", {"embedding_scale": 2.0}),
        ("deepmind", {"rope_dims": 4}),
        ("hf", {"soft_cap": 0.0}),
        ("hf", {"embedding_scale": 1.0}),
        ("hf", {"lru_heads": 2}),
        ("hf", {"window": 1}),
    ],
)
def test_what_a_package_cannot_run_is_refused(name, change):
    with pytest.raises(RequestError) as raised:
        make(name, dataclasses.replace(ODD_CONFIGS["regular"], **change))
    assert "\n" not in str(raised.value)
    assert next(iter(change)).removeprefix("lru_") in str(raised.value)


@pytest.mark.parametrize("version", ["4.57.1", "5.23.0", "6.0.0.dev0"])
def test_another_transformers_is_refused(version, monkeypatch):
    pytest.importorskip("transformers")
    from rgexport.validate.reference import hugging_face_model

    monkeypatch.setattr(hugging_face_model.transformers, "__version__", version)
    with pytest.raises(RequestError, match=f"found {version}: pip install"):
        make("hf", ODD_CONFIGS["regular"])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_watch_and_stops_see_the_same(name):
    model, own = make(name, ODD_CONFIGS["regular"])
    texts = [(tokens_of(own.config, 1, n), zero_state(own.config, 1)) for n in (1, 50)]
    seen: dict[str, dict[tuple[int, int], np.ndarray]] = {"theirs": {}, "ours": {}}
    found = {}
    for side, one in (("theirs", model), ("ours", own)):
        found[side] = one.run_each(
            texts,
            stops=[(), (3, 20)],
            watch=lambda layer, place, x, side=side: seen[side].update(
                {(layer, place): x.numpy().copy()}
            ),
        )
    assert seen["theirs"].keys() == seen["ours"].keys()
    for key, stream in seen["ours"].items():
        assert np.abs(seen["theirs"][key] - stream).max() <= 1e-4 * np.abs(stream).max(), key
    for (_, theirs), (_, ours) in zip(found["theirs"], found["ours"], strict=True):
        assert len(theirs) == len(ours)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_state(one, other)
