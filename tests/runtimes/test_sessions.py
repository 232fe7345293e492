"""Sessions of every engine, against DeepMind's implementation and each other."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import POSITION
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.session import Session
from tests.deepmind import deepmind_logits, deepmind_model, deepmind_step
from tests.models import ODD_CONFIGS, Weights, make_config
from tests.runtimes.engines import ENGINES, EXPORTS, engine
from tests.sessions import check_refusals, distance, ragged, random_tokens

FP32 = {"onnx": 1e-4, "coreml": 2e-5, "gguf": 1e-4}
"""Largest |Δlogit| allowed, as a share of the largest |logit|."""
CONTINUED = {"onnx": 1e-6, "coreml": 2e-5, "gguf": 1e-5}
"""The same between a text that is read at once and one that another session continues."""
FP16 = {"onnx": 2e-2, "coreml": 3e-2}
"""The same in float16."""
FAR = {"onnx": 1e-4, "coreml": 2e-5, "gguf": 1e-2}
"""llama.cpp multiplies up the angles of a key's pairs in float32, for all of ggml's models."""
BY_CHUNK = {"prefill_length": 7, "all_logits": True}
LONGER_THAN_WINDOW = {"prefill_length": 40, "all_logits": True, "recurrent_state": "hilo"}
EVERY = [
    *(engine(kind, name, {}) for kind in ("onnx", "gguf") for name in ODD_CONFIGS),
    *(engine("coreml", name, BY_CHUNK) for name in ODD_CONFIGS),
    *(engine("coreml", name, LONGER_THAN_WINDOW) for name in ("one_head", "attention_tail")),
]


TRAVELERS = [
    *(engine(kind, {}) for kind in EXPORTS),
    engine("coreml", {"prefill_length": 8, "recurrent_state": "hilo"}),
]


def opened(
    kind: str, config: GriffinConfig, folder: Path, **options: Any
) -> tuple[Session, Weights]:
    """On one thread: small models take longer on several, most of all on a busy machine."""
    artifact, weights = EXPORTS[kind](config, folder, **options)
    return open_session(artifact, threads=1), weights


@pytest.mark.parametrize(("kind", "name", "options"), EVERY)
def test_equals_deepmind(kind: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """In one go, in chunks that end anywhere, and step by step; a batch, and one."""
    config = ODD_CONFIGS[name]
    session, weights = opened(kind, config, tmp_path, **options)
    tokens = random_tokens(config, 3, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    for batch, sizes in itertools.product((3, 1), ([tokens.shape[1]], [7, 1, config.window + 1])):
        session.reset(batch)
        assert distance(ragged(session, tokens[:batch], sizes), expected[:batch]) <= FP32[kind]
        assert session.position.tolist() == [tokens.shape[1]] * batch
    batch = 1 if kind == "coreml" else 3
    session.reset(batch)
    steps = np.stack([session.step(column) for column in tokens[:batch].T], 1)
    assert distance(steps, expected[:batch]) <= FP32[kind]


@pytest.mark.parametrize("name", ["narrow_lru", "attention_tail", "one_head"])
@pytest.mark.parametrize("kind", FP16)
def test_float16_is_near_deepmind(kind: str, name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    options = {"prefill_length": 8, "all_logits": True} if kind == "coreml" else {}
    session, weights = opened(kind, config, tmp_path, precision="fp16", **options)
    tokens = random_tokens(config, 2, 4 * config.window)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session.reset(2)
    assert distance(ragged(session, tokens, [5, 1, 30]), expected) <= FP16[kind]


@pytest.mark.parametrize("start", [0, 9, 53])
@pytest.mark.parametrize("name", ["irregular", "hawk", "attention_only"])
@pytest.mark.parametrize("other", ENGINES)
@pytest.mark.parametrize(("kind", "options"), TRAVELERS)
def test_a_state_travels(
    kind: str, options: dict[str, Any], other: str, name: str, start: int, tmp_path: Path
) -> None:
    """What one session has read, another continues; in the same engine, to the last bit."""
    config = ODD_CONFIGS[name]
    here, weights = opened(kind, config, tmp_path, **options)
    there, _ = opened(other, config, tmp_path, **(options if kind == other else {}))
    tokens, limit = random_tokens(config, 3, 70), max(FP32[kind], FP32[other])
    expected = deepmind_logits(deepmind_model(config, weights), tokens)[:, start:]
    here.reset(3)
    whole = here.prefill(tokens, 70)[:, start:]
    here.reset(3)
    if start:
        here.prefill(tokens[:, :start])
    state = here.get_state()
    there.set_state(state)
    assert there.position.tolist() == [start] * 3
    continued = there.prefill(tokens[:, start:], 70 - start)
    assert distance(continued, expected) <= limit
    if kind == other:
        assert distance(continued, whole) <= CONTINUED[kind]
        there.set_state(state)
        again = there.get_state()
        assert all(np.array_equal(again[name], array) for name, array in state.items())
        np.testing.assert_array_equal(here.prefill(tokens[:, start:], 70 - start), continued)
    there.set_state({name: array[1:2] for name, array in state.items()})
    assert distance(there.step(tokens[1:2, start]), expected[1:2, 0]) <= limit
    np.testing.assert_array_equal(state[POSITION], [start] * 3)


@pytest.mark.parametrize("start", [100_000, (1 << 20) + 17])
@pytest.mark.parametrize("head_dim", [8, 256])
@pytest.mark.parametrize("kind", ENGINES)
def test_far_positions(kind: str, head_dim: int, start: int, tmp_path: Path) -> None:
    """256 is the head of the released models, with 64 frequencies to be rounded right."""
    config = make_config("raar", width=2 * head_dim, heads=2, window=24)
    session, weights = opened(kind, config, tmp_path)
    session.reset(2)
    tokens = random_tokens(config, 2, config.window + 30)
    # A ring buffer would be entered at another slot: DeepMind's starts at the oldest key.
    session.prefill(tokens[:, :-1])
    state = session.get_state() | {POSITION: np.array([start, start + 5])}
    session.set_state(state)
    found = session.step(tokens[:, -1])
    model = deepmind_model(config, weights)
    expected = deepmind_step(model, state, tokens[:, -1], state[POSITION])
    assert distance(found, expected) <= FAR[kind]


@pytest.mark.parametrize("kind", ENGINES)
def test_wrong_requests(kind: str, tmp_path: Path) -> None:
    session, _ = opened(kind, ODD_CONFIGS["regular"], tmp_path)
    check_refusals(session)
    session.reset(1)
    session.verify(range(1), np.array([[2, 3]]))
    with pytest.raises(ValueError, match="cannot be kept"):
        session.accept([3])
    session.accept([2])
    with pytest.raises(ValueError, match="call verify first"):
        session.accept([2])
