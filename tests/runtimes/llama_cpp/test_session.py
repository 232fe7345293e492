"""What llama.cpp sessions have of their own; see tests/runtimes/test_sessions.py."""

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
from rgexport.runtimes.session import Session
from tests.artifacts import export_random_gguf
from tests.deepmind import deepmind_logits, deepmind_model
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS
from tests.sessions import distance, random_tokens

pytestmark = needs_llama_cpp

FP32, FLASH = 1e-4, 5e-3
"""Largest |Δlogit| allowed, as a share of the largest |logit|. FLASH: llama.cpp's flash attention
rounds keys, values and queries to float16, and on a CPU sums values in float16."""


def _session(artifact: Artifact, **options: Any) -> LlamaCppSession:
    """On one thread: small models take longer on several, most of all on a busy machine."""
    return LlamaCppSession(artifact, **({"threads": 1} | options))


def _all(session: Session, tokens: np.ndarray) -> np.ndarray:
    return session.prefill(tokens, tokens.shape[1])


@pytest.mark.parametrize(("flash", "limit"), [(False, FP32), (True, FLASH)])
@pytest.mark.parametrize("name", ["narrow_lru", "hawk", "attention_tail", "one_head"])
def test_batches_of_any_size(name: str, flash: bool, limit: float, tmp_path: Path) -> None:
    config = ODD_CONFIGS[name]
    artifact, weights = export_random_gguf(config, tmp_path)
    tokens = random_tokens(config, 3, 4 * config.window + 3)
    expected = deepmind_logits(deepmind_model(config, weights), tokens)
    for ubatch in (1, 7, 512):
        session = _session(artifact, ubatch=ubatch, flash_attention=flash)
        for batch in (3, 1):
            session.reset(batch)
            assert distance(_all(session, tokens[:batch]), expected[:batch]) <= limit


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


def test_with_and_without_mmap(tmp_path: Path) -> None:
    artifact, _ = export_random_gguf(ODD_CONFIGS["wide_lru"], tmp_path, "q8_0")
    tokens = random_tokens(ODD_CONFIGS["wide_lru"], 1, 40)
    mapped, copied = (_all(_session(artifact, mmap=mmap), tokens) for mmap in (True, False))
    np.testing.assert_array_equal(mapped, copied)
