"""A transformer in llama.cpp, one conversation at a time."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import any_gguf
from bench.any_gguf import AnyGguf
from bench.gemma_shape import write_gemma
from rgexport.griffin.state import POSITION
from rgexport.runtimes.bench import measure as bench
from tests.bench.test_gemma_shape import SMALL
from tests.llama_tools import needs_llama_cpp

pytestmark = needs_llama_cpp


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    write_gemma(tmp_path / "small.gguf", SMALL)
    return tmp_path / "small.gguf"


def test_depths_are_reached_once(gemma, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.05)
    monkeypatch.setattr(any_gguf, "STATES", tmp_path / "states")
    for verb in ("reach", "time"):
        monkeypatch.setattr("sys.argv", ["any_gguf", verb, str(gemma), "0,40,80", "40"])
        any_gguf.main()
        captured = capsys.readouterr()
        assert ("Processing tokens up to depth 40" in captured.err) == (verb == "reach")
    files = sorted(path.name for path in (tmp_path / "states" / "small").iterdir())
    assert files == ["0.npy", "40.npy", "80.npy"]
    rows = json.loads(captured.out)
    tests = [(row["test"], row["depth"], row["state"]) for row in rows]
    assert tests == [("tg32", 0, "processed"), ("tg32", 40, "processed"), ("tg32", 80, "doubled")]
    assert rows[0]["engine"] == "llama.cpp" and rows[0]["artifact_bytes"] == gemma.stat().st_size
    assert 0 < gemma.stat().st_size - rows[0]["bytes_per_token"] < 10_000


def test_doubled_state_is_that_of_the_tokens_twice(gemma):
    """In one layer, keys and values are of the tokens and places, not of what was before."""
    write_gemma(gemma, replace(SMALL, layers=1))
    tokens = np.arange(30)[None]
    session = AnyGguf(gemma, 256, doubling=True)
    session.prefill(tokens)
    state = session.doubled(session.get_state())
    assert state[POSITION] == [60]
    session.set_state(state)
    found = session.step(np.array([3]))
    session.reset()
    session.prefill(tokens)
    once = session.step(np.array([3]))
    session.reset()
    session.prefill(np.concatenate([tokens, tokens], axis=1))
    expected = session.step(np.array([3]))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 2e-2 * scale < np.abs(once - expected).max()
