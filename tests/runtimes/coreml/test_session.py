"""Core ML sessions, in the interpreter, against DeepMind's implementation."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.package import PACKAGE, weight_file
from rgexport.export.mil.package import open_package
from rgexport.griffin.state import POSITION
from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner
from rgexport.runtimes.coreml.session import CoreMLSession
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.onnx.session import OrtSession
from tests.artifacts import export_random, export_random_coreml
from tests.deepmind import deepmind_logits, deepmind_model, deepmind_step
from tests.models import ODD_CONFIGS, make_config
from tests.sessions import check_refusals, distance, ragged, random_tokens

FP32, FP16, SAME = 2e-5, 3e-2, 1e-5
"""Largest |Δlogit| allowed, as a share of the largest |logit|."""


class CountingRunner(InterpreterRunner):
    """Counts the calls of each function."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(open_package(artifact.file(PACKAGE)))
        self.calls: Counter[str] = Counter()

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any) -> Any:
        self.calls[function] += 1
        return super().predict(function, inputs, state)


@pytest.mark.parametrize(
    ("name", "recurrent_state"),
    [*((name, "io") for name in ODD_CONFIGS), ("not_by_32", "hilo"), ("one_head", "hilo")],
)
def test_fp32_equals_deepmind(name: str, recurrent_state: Any, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_coreml(
        config, tmp_path, all_logits=True, prefill_length=7, recurrent_state=recurrent_state
    )
    tokens = random_tokens(config, 3, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = open_session(artifact)
    session.reset(3)
    assert distance(ragged(session, tokens, [tokens.shape[1]]), expected) <= FP32
    session.reset()
    assert distance(ragged(session, tokens[:1], [9, 1, config.window + 1]), expected[:1]) <= FP32
    session.reset()
    steps = [session.step(column) for column in tokens[:1].T]
    assert distance(np.stack(steps, 1), expected[:1]) <= FP32


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_fp16_is_near_deepmind(name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_coreml(config, tmp_path, "fp16", prefill_length=8)
    tokens = random_tokens(config, 1, 4 * config.window)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = open_session(artifact)
    found = [
        session.prefill(tokens[:, start : start + 8])[:, -1]
        for start in range(0, tokens.shape[1], 8)
    ]
    assert distance(np.stack(found, 1), expected[:, 7::8]) <= FP16


@pytest.mark.parametrize("prefill_length", [2, 40])
def test_prefill_of_any_length(prefill_length: int, tmp_path: Path) -> None:
    """Also one that is longer than the window: nothing of the old keys is left then."""
    config = ODD_CONFIGS["attention_tail"]
    artifact, weights = export_random_coreml(
        config, tmp_path, all_logits=True, prefill_length=prefill_length
    )
    tokens = random_tokens(config, 1, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = open_session(artifact)
    assert distance(session.prefill(tokens, tokens.shape[1]), expected) <= FP32


@pytest.mark.parametrize("recurrent_state", ["io", "hilo"])
def test_states_travel_from_engine_to_engine(recurrent_state: Any, tmp_path: Path) -> None:
    config = ODD_CONFIGS["irregular"]
    package, weights = export_random_coreml(
        config, tmp_path, prefill_length=8, recurrent_state=recurrent_state
    )
    onnx, _ = export_random(config, tmp_path)
    tokens = random_tokens(config, 3, 3 * config.window)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    engines = CoreMLSession(package), OrtSession(onnx)
    for first, second in (engines, engines[::-1]):
        first.reset(3)
        first.prefill(tokens[:, :69])
        state = first.get_state()
        second.set_state(state)
        assert second.position.tolist() == [69] * 3
        continued = np.stack([second.step(column) for column in tokens[:, 69:].T], 1)
        assert distance(continued, expected[:, 69:]) <= FP32
        one = {name: array[1:2] for name, array in state.items()}
        second.set_state(one)
        assert distance(second.step(tokens[1:2, 69]), expected[1:2, 69]) <= FP32
        np.testing.assert_array_equal(state[POSITION], [69] * 3)


@pytest.mark.parametrize("recurrent_state", ["io", "hilo"])
def test_a_state_that_is_taken_and_given_back_changes_nothing(
    recurrent_state: Any, tmp_path: Path
) -> None:
    config = ODD_CONFIGS["not_by_32"]
    artifact, _ = export_random_coreml(
        config, tmp_path, prefill_length=4, recurrent_state=recurrent_state
    )
    tokens = random_tokens(config, 2, 30)
    session, other = CoreMLSession(artifact), CoreMLSession(artifact)
    session.reset(2)
    session.prefill(tokens[:, :-1])
    state = session.get_state()
    assert {a.dtype for name, a in state.items() if name != POSITION} == {np.dtype(np.float32)}
    other.set_state(state)
    for name, array in other.get_state().items():
        np.testing.assert_array_equal(array, state[name])
    np.testing.assert_array_equal(other.step(tokens[:, -1]), session.step(tokens[:, -1]))


def test_rows_of_a_batch_do_not_touch_each_other(tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random_coreml(config, tmp_path, "fp16", prefill_length=8)
    tokens = random_tokens(config, 3, 21)
    session = CoreMLSession(artifact)
    session.reset(3)
    together = session.prefill(tokens)
    for row in range(3):
        session.reset()
        np.testing.assert_array_equal(session.prefill(tokens[row : row + 1])[0], together[row])


def test_chunks_go_through_prefill(tmp_path: Path) -> None:
    """Without all logits, tokens whose logits are wanted are decoded unless they end a chunk."""
    config = ODD_CONFIGS["hawk"]
    tokens = random_tokens(config, 1, 42)
    found = {}
    for all_logits in (False, True):
        artifact, _ = export_random_coreml(
            config, tmp_path, prefill_length=8, all_logits=all_logits
        )
        runner = CountingRunner(artifact)
        session = CoreMLSession(artifact, runner=runner)
        assert session.info.chunk_logits == all_logits and session.info.prefill_chunk == 8
        for wanted in (1, 2, 3, 11, 42, 99):
            session.reset()
            runner.calls.clear()
            logits = session.prefill(tokens, wanted)
            assert logits.shape == (1, min(wanted, 42), config.vocab_size)
            found[all_logits, wanted] = logits
            calls = runner.calls["prefill"], runner.calls["decode"]
            whole = {1: 5, 2: 5, 3: 5, 11: 4, 42: 0, 99: 0}[wanted] if not all_logits else 5
            assert calls == (whole, 42 - 8 * whole)
    every = found[True, 42]
    for logits in found.values():
        assert distance(logits, every[:, -logits.shape[1] :]) <= SAME


def test_far_positions(tmp_path: Path) -> None:
    """256 is the head of the released models, with 64 frequencies to be rounded right."""
    config = make_config("ra", width=512, heads=2, window=24)
    artifact, weights = export_random_coreml(config, tmp_path, prefill_length=16)
    model = deepmind_model(config, weights)
    session = CoreMLSession(artifact)
    session.reset(2)
    tokens = random_tokens(config, 2, config.window + 30)
    session.prefill(tokens[:, :-1])
    state = session.get_state()
    for start in (100_000, 131_072 + 17):
        state[POSITION] = np.array([start, start + 5])
        session.set_state(state)
        found = session.step(tokens[:, -1])
        expected = deepmind_step(model, state, tokens[:, -1], state[POSITION])
        assert distance(found, expected) <= FP32


def test_long_decays(tmp_path: Path) -> None:
    """What a float16 state loses: 4096 steps with decays up to 1 - 1e-5, in both forms."""
    config = make_config("r", width=32, heads=2, mlp_width=32, vocab_size=16)
    tokens = random_tokens(config, 1, 4096)
    states = []
    for form in ("io", "hilo"):
        artifact, _ = export_random_coreml(
            config, tmp_path, slowest=1e-5, prefill_length=128, recurrent_state=form
        )
        session = CoreMLSession(artifact)
        session.prefill(tokens)
        states.append(session.get_state()["layers.0.rg_lru"])
    assert distance(states[1], states[0]) <= 1e-5


def test_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ODD_CONFIGS["not_by_32"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    artifact, _ = export_random_coreml(config, tmp_path, "fp16")
    info = CoreMLSession(artifact, threads=3).info
    assert info.engine == "MIL interpreter" and info.threads == 3
    assert info.activation_dtype == "float16" and info.prefill_chunk == 128
    caches = 2 * (2 * 24 * 8 + 2 * 3 * 60)  # float16, without the padding
    assert info.state_bytes == caches + 2 * 60 * 4
    size = artifact.file(weight_file()).stat().st_size
    assert 0.95 * size < info.weight_bytes < size, "all but headers and padding"


def test_wrong_requests(tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    session = CoreMLSession(export_random_coreml(config, tmp_path)[0])
    check_refusals(session)
