"""What Core ML sessions have of their own; see tests/runtimes/test_sessions.py."""

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
from rgexport.runtimes.coreml.interpreter.interpreter import InterpreterRunner
from rgexport.runtimes.coreml.session import CoreMLSession
from tests.artifacts import export_random_coreml
from tests.models import ODD_CONFIGS, make_config
from tests.sessions import distance, random_tokens


class CountingRunner(InterpreterRunner):
    """Counts the calls of each function."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(open_package(artifact.file(PACKAGE)))
        self.calls: Counter[str] = Counter()

    def predict(self, function: str, inputs: Mapping[str, np.ndarray], state: Any) -> Any:
        self.calls[function] += 1
        return super().predict(function, inputs, state)


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
        assert distance(logits, every[:, -logits.shape[1] :]) <= 1e-5


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
