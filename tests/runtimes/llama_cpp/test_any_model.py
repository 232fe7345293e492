"""Other models in llama.cpp: states, room that grows, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION
from rgexport.runtimes.llama_cpp import any_model
from rgexport.runtimes.llama_cpp.any_model import DATA, SIZES, AnyModelSession
from rgexport.runtimes.llama_cpp.session import LlamaCppSession
from tests.artifacts import export_random_gguf
from tests.foreign_gguf import TRAINED, write_gpt2, write_llama
from tests.llama_tools import needs_llama_cpp
from tests.models import ODD_CONFIGS
from tests.sessions import distance, random_tokens

pytestmark = needs_llama_cpp

VOCAB, FLOAT16 = 300, 2e-2
"""Keys and values are rounded to float16, and flash attention sums in it."""
TOKENS = np.random.default_rng(5).integers(0, VOCAB, (3, 700))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama.gguf", vocab_size=VOCAB)


def session_of(path: Path, **options: int) -> AnyModelSession:
    return AnyModelSession(path, threads=1, **options)


def test_rows_are_those_of_one_text_each(llama):
    batched, single = session_of(llama), session_of(llama)
    batched.reset(3)
    found = batched.prefill(TOKENS, 20)
    assert batched.position.tolist() == [700] * 3 and found.shape == (3, 20, VOCAB)
    for row, text in enumerate(TOKENS):
        single.reset()
        assert distance(single.prefill(text[None], 20)[0], found[row]) < FLOAT16


@pytest.mark.parametrize("window", [None, 32])
def test_goes_on_from_a_state(window, tmp_path):
    """In the same session or in another one, after other tokens, and with other rows."""
    values = {"attention.sliding_window": window} if window else {}
    path = write_llama(tmp_path / "x.gguf", vocab_size=VOCAB, **values)
    session = session_of(path)
    session.reset(2)
    session.prefill(TOKENS[:2, :600])
    state = session.get_state()
    assert state[POSITION].tolist() == [600, 600]
    assert (state[DATA].shape, state[DATA].dtype) == ((2, state[SIZES].max()), np.uint8)
    expected = session.prefill(TOKENS[:2, 600:650], 50)
    for other in (session, session_of(path)):
        other.set_state(state)
        np.testing.assert_allclose(other.prefill(TOKENS[:2, 600:650], 50), expected, atol=0.05)
    session.reset(3)
    session.prefill(TOKENS[:, :100])
    session.set_rows(range(1, 3), state)
    assert session.position.tolist() == [100, 600, 600]
    found = session.take(range(1, 3), TOKENS[:2, 600:650], 50)
    assert distance(found, expected) < FLOAT16


def test_where_a_state_is_set_changes_no_bit(llama):
    """In the session that it is of, or in a fresh one: runs that are cut off end the same."""
    session, tokens = session_of(llama), np.random.default_rng(1).integers(0, VOCAB, (8, 300))
    session.reset(8)
    session.prefill(tokens[:, :200])
    state = session.get_state()
    session.prefill(tokens[:, 200:231])
    found = []
    for each in (session, session_of(llama)):
        each.set_state(state)
        found.append(each.prefill(tokens[:, 200:], 60))
    assert np.array_equal(*found)


def test_a_sequence_without_tokens_has_no_state(llama):
    session = session_of(llama)
    session.reset(2)
    session.take(range(1), TOKENS[:1, :10])
    state = session.get_state()
    assert state[SIZES][0] > 0 == state[SIZES][1] and not state[DATA][1].any()
    session.set_state(state)
    assert session.position.tolist() == [10, 0]


def test_room_grows_while_a_text_is_read_and_is_given_back(llama):
    whole, growing = session_of(llama, room=1024), session_of(llama, room=256)
    expected = whole.prefill(TOKENS[:1], 700)
    for _ in range(2):
        parts = [growing.prefill(TOKENS[:1, at : at + 100], 100) for at in range(0, 700, 100)]
        assert distance(np.concatenate(parts, 1), expected) < FLOAT16
        assert growing._open.room == 1024
        growing.reset()
        assert growing._open.room == 256


def test_memory_is_bounded(llama, monkeypatch):
    session = session_of(llama)
    session.prefill(TOKENS[:1, :500])
    monkeypatch.setattr(any_model, "available_bytes", lambda: 100_000)
    with pytest.raises(RequestError, match=r"llama.gguf keeps 275 kB of 1 texts of 1,024 tok"):
        session.prefill(TOKENS[:1, :100])
    assert session.position == [500]  # and it can still be used
    session.prefill(TOKENS[:1, :10])
    with pytest.raises(RequestError, match=r"llama.gguf keeps 1.10 MB of 8 texts of 512 tokens"):
        session.reset(8)


def test_learned_positions_end(tmp_path):
    session = session_of(write_gpt2(tmp_path / "gpt2.gguf"))
    session.prefill(np.zeros((1, TRAINED), np.int64))
    with pytest.raises(RequestError, match=f"no positions beyond the {TRAINED} tokens"):
        session.prefill(np.zeros((1, 1), np.int64))


def test_what_tells_no_next_token(tmp_path):
    path = write_llama(tmp_path / "x.gguf", vocab_size=VOCAB, **{"attention.causal": False})
    with pytest.raises(RequestError, match=r"x.gguf does not tell the next token of a text"):
        session_of(path)


def test_states_of_another_model(llama, tmp_path):
    artifact, _ = export_random_gguf(ODD_CONFIGS["regular"], tmp_path)
    session = session_of(llama)
    state = LlamaCppSession(artifact, threads=1).get_state()
    with pytest.raises(RequestError, match="this state is of another model"):
        session.set_state(state)
    session.prefill(TOKENS[:1, :10])
    state = session.get_state()
    with pytest.raises(RequestError, match=r"llama.cpp cannot restore the state"):
        session.set_state(state | {DATA: state[DATA][:, ::-1]})


@pytest.mark.parametrize("name", ["regular", "hawk", "attention_only"])
def test_a_recurrentgemma_of_another_tool(name, tmp_path, without_marks):
    """Our own file without what tells that it is ours."""
    config = ODD_CONFIGS[name]
    artifact, _ = export_random_gguf(config, tmp_path)
    ours, theirs = LlamaCppSession(artifact, threads=1), session_of(without_marks(artifact.path))
    tokens = random_tokens(config, 2, 90)
    for session in (ours, theirs):
        session.reset(2)
    expected = ours.prefill(tokens[:, :60], 60)
    assert distance(theirs.prefill(tokens[:, :60], 60), expected) < FLOAT16
    theirs.set_state(theirs.get_state())
    assert distance(theirs.prefill(tokens[:, 60:], 30), ours.prefill(tokens[:, 60:], 30)) < FLOAT16


@pytest.fixture
def without_marks(tmp_path: Path) -> Callable[[Path], Path]:
    def change(path: Path) -> Path:
        target = tmp_path / "theirs.gguf"
        target.write_bytes(path.read_bytes().replace(b"rgexport.", b"somebody."))
        return target

    return change
