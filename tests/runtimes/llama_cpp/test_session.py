"""llama.cpp sessions against DeepMind's implementation, and against ONNX Runtime's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rgexport import progress
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.griffin.state import POSITION
from rgexport.runtimes.llama_cpp import context as llama_cpp_context
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from rgexport.runtimes.onnx.session import OrtSession
from rgexport.runtimes.session import Session
from tests.artifacts import export_random, export_random_gguf
from tests.deepmind import deepmind_logits, deepmind_model, deepmind_step
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS, make_config
from tests.sessions import check_refusals, distance, random_tokens

pytestmark = needs_llama_cpp

FP32, FLASH = 1e-4, 5e-3
"""Largest |Δlogit| allowed, as a share of the largest |logit|. FLASH: llama.cpp's flash attention
rounds keys, values and queries to float16, and on a CPU sums values in float16."""


def _session(artifact: Artifact, **options: Any) -> LlamaCppSession:
    """On one thread: small models take longer on several, most of all on a busy machine."""
    return LlamaCppSession(artifact, **({"threads": 1} | options))


def _all(session: Session, tokens: np.ndarray) -> np.ndarray:
    return session.prefill(tokens, tokens.shape[1])


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_f32_equals_deepmind(name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 3, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    for ubatch in (1, 7, 512):
        session = _session(artifact, ubatch=ubatch)
        for batch in (3, 1):
            session.reset(batch)
            assert distance(_all(session, tokens[:batch]), expected[:batch]) <= FP32
    session.reset(3)
    steps = [session.step(column) for column in tokens.T]
    assert distance(np.stack(steps, 1), expected) <= FP32
    assert session.position.tolist() == [tokens.shape[1]] * 3


@pytest.mark.parametrize("name", ["regular", "narrow_lru", "attention_tail", "one_head"])
def test_flash_attention_is_near_deepmind(name: str, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 2, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    for ubatch in (1, 7, 512):
        session = _session(artifact, ubatch=ubatch, flash_attention=True)
        session.reset(2)
        assert distance(_all(session, tokens), expected) <= FLASH


@pytest.mark.parametrize("flash_attention", [False, True], ids=["plain", "flash"])
@pytest.mark.parametrize("name", ["irregular", "hawk", "attention_only"])
def test_state_travels(name: str, flash_attention: bool, tmp_path: Path) -> None:
    """Saved before and after a full window, it is continued to the last bit."""
    config = ODD_CONFIGS[name]
    artifact, _ = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 3, 3 * config.window)
    session = _session(artifact, flash_attention=flash_attention)
    other = _session(artifact, flash_attention=flash_attention, threads=2)
    session.reset(3)
    whole = _all(session, tokens)
    for start in (5, config.window, 2 * config.window + 5):
        session.reset(3)
        session.prefill(tokens[:, :start])
        saved = session.get_state()
        continued = _all(session, tokens[:, start:])
        assert distance(continued, whole[:, start:]) <= (FLASH if flash_attention else 1e-5)
        for restored in (session, other):
            restored.set_state(saved)
            np.testing.assert_array_equal(restored.position, [start] * 3)
            again = restored.get_state()
            assert again.keys() == saved.keys()
            for name_, array in saved.items():
                np.testing.assert_array_equal(again[name_], array)
            np.testing.assert_array_equal(_all(restored, tokens[:, start:]), continued)
    one = {name_: array[1:2] for name_, array in saved.items()}
    other.set_state(one)
    assert distance(other.step(tokens[1:2, start]), whole[1:2, start]) <= FLASH


@pytest.mark.parametrize("name", ODD_CONFIGS)
@pytest.mark.parametrize("start", [0, 9, 53])
def test_conversation_moves_between_engines(name: str, start: int, tmp_path: Path) -> None:
    """What one engine has read, the other continues; DeepMind reads all of it."""
    config = ODD_CONFIGS[name]
    gguf, weights = export_random_gguf(config, tmp_path)
    onnx, _ = export_random(config, tmp_path)
    tokens = random_tokens(config, 2, 70)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)[:, start:]
    engines: list[Session] = [_session(gguf), OrtSession(onnx)]
    for here, there in (engines, engines[::-1]):
        here.reset(2)
        if start:
            here.prefill(tokens[:, :start])
        there.set_state(here.get_state())
        assert distance(_all(there, tokens[:, start:]), expected) <= FP32
        assert there.position.tolist() == [70, 70]


def test_sequences_do_not_touch_each_other(tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 5, 50)
    session = _session(artifact, ubatch=16)
    session.reset(5)
    together = _all(session, tokens)
    for row in range(5):
        session.reset()
        alone = _all(session, tokens[row : row + 1])
        assert distance(together[row : row + 1], alone) <= 1e-5

    session.reset()
    session.prefill(tokens[1:2, :20])
    begun = session.get_state()
    mixed = {name: np.concatenate([np.zeros_like(array), array]) for name, array in begun.items()}
    session.set_state(mixed)
    assert session.position.tolist() == [0, 20]
    found = _all(session, tokens[[2, 1], 20:40])
    session.reset()
    assert distance(found[:1], _all(session, tokens[2:3, 20:40])) <= 1e-5
    assert distance(found[1:], together[1:2, 20:40]) <= 1e-5


def test_there_is_no_last_token(tmp_path: Path) -> None:
    """Many times what fits into llama.cpp's context, in chunks and token by token."""
    config = ODD_CONFIGS["irregular"]
    artifact, weights = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 2, 900)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    session = _session(artifact, ubatch=20)
    session.reset(2)
    assert session._open.room < 300
    assert distance(_all(session, tokens[:, :700]), expected[:, :700]) <= FP32
    for column in range(700, 900):
        assert distance(session.step(tokens[:, column]), expected[:, column]) <= FP32


@pytest.mark.parametrize("start", [1 << 17, (1 << 20) + 17])
def test_far_positions(start: int, tmp_path: Path) -> None:
    """The angles of a key's pairs are multiplied up in float32, for all of ggml's models."""
    config = make_config("raar", width=512, heads=2, window=24)
    artifact, weights = export_random_gguf(config, tmp_path)
    model = deepmind_model(config, weights)
    session = _session(artifact)
    session.reset(2)
    tokens = random_tokens(config, 2, config.window + 30)
    session.prefill(tokens[:, :-1])
    state = session.get_state() | {POSITION: np.array([start, start + 5])}
    session.set_state(state)
    found = session.step(tokens[:, -1])
    expected = deepmind_step(model, state, tokens[:, -1], state[POSITION])
    assert distance(found, expected) <= 1e-2


@pytest.mark.parametrize(
    ("kind", "cache", "flash"),
    [("f32", "float32", False), ("f16", "float16", False), ("q8_0", "float16", True)],
)
def test_precision_follows_the_weights(kind: str, cache: str, flash: bool, tmp_path: Path) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path, kind)
    session = _session(artifact)
    assert session.get_state()["layers.2.key"].dtype == cache
    assert session._settings.flash_attention is flash


def test_num_logits_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 2, 40)
    monkeypatch.setattr(llama_cpp_context, "LOGITS_BYTES", 6 * 4 * config.vocab_size)
    session = _session(artifact, ubatch=16)
    session.reset(2)
    every = _all(session, tokens)
    for wanted in (0, 1, 2, 3, 4, 7, 8, 9, 24, 40, 99):
        session.reset(2)
        found = session.prefill(tokens, wanted)
        assert found.shape == (2, min(max(wanted, 1), 40), config.vocab_size)
        assert distance(found, every[:, -found.shape[1] :]) <= 1e-5


def test_with_and_without_mmap(tmp_path: Path) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["wide_lru"], tmp_path, "q8_0")
    tokens = random_tokens(ODD_CONFIGS["wide_lru"], 1, 40)
    mapped, copied = (_all(_session(artifact, mmap=mmap), tokens) for mmap in (True, False))
    np.testing.assert_array_equal(mapped, copied)


def test_a_closed_session(tmp_path: Path) -> None:
    session = _session(export_random_gguf(ODD_CONFIGS["regular"], tmp_path)[0])
    session.close()
    session.close()
    with pytest.raises(ValueError, match="the session is closed"):
        session.step(np.array([1]))


def test_what_a_session_tells(tmp_path: Path) -> None:
    config = ODD_CONFIGS["regular"]
    artifact, _ = export_random_gguf(config, tmp_path)
    session = _session(artifact)
    info = session.info
    assert (info.engine, info.threads, session.vocab_size) == ("llama.cpp", 1, config.vocab_size)
    stored = sum(p.nbytes for t in artifact.manifest.tensors.values() for p in t.parts.values())
    assert info.weight_bytes == stored
    assert info.state_bytes == sum(a.nbytes for a in session.get_state().values()) - 8


def test_wrong_requests(tmp_path: Path) -> None:
    session = _session(export_random_gguf(ODD_CONFIGS["regular"], tmp_path)[0])
    check_refusals(session)
    with pytest.raises(RequestError, match=r"llama.cpp takes 1 to 256"):
        session.reset(257)
    with pytest.raises(RequestError, match=r"2147483648 tokens; llama.cpp counts to"):
        session.set_state(session.get_state() | {POSITION: np.array([1 << 31])})
    assert session.prefill(np.array([[3, 4]])).shape == (1, 1, 256)


def test_its_log_is_for_those_who_ask(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    capfd.readouterr()
    _session(artifact).close()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(progress, "verbose", True)
    _session(artifact).close()
    out, err = capfd.readouterr()
    assert not out
    assert "llama.cpp: " in err
    assert all(line.startswith("llama.cpp: ") for line in err.splitlines())
