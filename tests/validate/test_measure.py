import numpy as np
import pytest

from rgexport.griffin.state import POSITION
from rgexport.validate import measure as module
from rgexport.validate.measure import measure
from tests.validate.toys import MEMORY, VOCAB, Fault, ToySession, WholeChunksSession, toy_pass

TOKENS = np.random.default_rng(9).integers(0, VOCAB, 100)


def test_a_right_session_differs_in_nothing() -> None:
    found = measure(ToySession(), TOKENS, toy_pass(TOKENS), toy_pass(TOKENS), text_bytes=50)
    for comparison in (found.twin, found.original):
        assert comparison is not None
        assert comparison.logits.relative_max < 1e-6
        assert comparison.kl.max < 1e-10
        assert comparison.agreement.top1 == 1
        assert comparison.likelihood is not None
        assert comparison.likelihood.tokens == 99
        assert [s.name for s in comparison.states] == [MEMORY]
        assert comparison.states[0].relative_max < 1e-6
    assert found.same_position
    assert found.steps.tokens == 8
    assert found.steps.logits.relative_max < 1e-6


def test_likelihood_is_that_of_the_next_token() -> None:
    found = measure(ToySession(), TOKENS, toy_pass(TOKENS)).twin.likelihood
    logits = toy_pass(TOKENS).logits(0, len(TOKENS)).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_p[np.arange(99), TOKENS[1:]].mean()
    assert found is not None and found.nll == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("limit", [1, 12 * 2 * 4 * VOCAB])
def test_blocks_cover_the_text_once(
    length: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    session = ToySession()
    found = measure(session, TOKENS[:length], toy_pass(TOKENS[:length]))
    steps = found.steps.tokens
    assert steps == min(8, length)
    assert sum(session.chunks) == length + steps, "all in chunks, the last ones again as steps"
    assert max(session.chunks) <= (8 if limit == 1 else 12)
    assert found.twin.logits.relative_max < 1e-6


def test_the_original_is_compared_apart() -> None:
    found = measure(ToySession(), TOKENS, toy_pass(TOKENS), toy_pass(TOKENS, seed=1))
    assert found.original is not None
    assert found.twin.kl.mean < 1e-10
    assert found.original.kl.mean > 0.1
    assert found.original.states[0].relative_max > 0.1


def test_wrong_logits_are_seen() -> None:
    def late(session: ToySession, logits: np.ndarray) -> np.ndarray:
        return np.roll(logits, 1, axis=1)

    found = measure(ToySession(fault=late), TOKENS, toy_pass(TOKENS))
    assert found.twin.logits.relative_rms > 0.5
    assert found.twin.agreement.top1 < 0.9


def test_a_state_that_is_lost_between_chunks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.h[:] = 0
        return logits

    monkeypatch.setattr(module, "MAX_BLOCK", 10)
    found = measure(ToySession(fault=forget), TOKENS, toy_pass(TOKENS))
    assert found.twin.logits.relative_max > 0.1
    assert found.twin.states[0].relative_max == 1
    assert found.steps.logits.relative_max > 0.1


def test_steps_that_differ_from_the_chunk_are_seen() -> None:
    def wrong_step(session: ToySession, logits: np.ndarray) -> np.ndarray:
        return logits + (session.chunks[-1] == 1)

    found = measure(ToySession(fault=wrong_step), TOKENS, toy_pass(TOKENS))
    assert found.twin.logits.relative_max < 1e-6
    assert found.steps.logits.max == pytest.approx(1, rel=1e-5)


def test_a_position_that_is_not_counted_is_seen() -> None:
    def stuck(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.position = session.position - 1
        return logits

    assert not measure(ToySession(fault=stuck), TOKENS, toy_pass(TOKENS)).same_position


def test_nan_in_the_logits_reaches_the_result() -> None:
    def broken(session: ToySession, logits: np.ndarray) -> np.ndarray:
        logits[..., 3] = np.nan
        return logits

    found = measure(ToySession(fault=broken), TOKENS, toy_pass(TOKENS))
    assert found.twin.logits.non_finite_positions == len(TOKENS)
    assert np.isnan(found.twin.logits.relative_max)


def test_the_state_before_the_last_block_is_restored() -> None:
    session = ToySession()
    measure(session, TOKENS, toy_pass(TOKENS))
    assert session.get_state()[POSITION].tolist() == [len(TOKENS)]


@pytest.mark.parametrize("chunk_logits", [True, False])
@pytest.mark.parametrize("length", [1, 5, 64, 71, 72, 100, 300])
def test_a_chunk_of_fixed_length_is_taken_whatever_the_text(
    length: int, chunk_logits: bool
) -> None:
    tokens = np.resize(TOKENS, length)
    session = WholeChunksSession(chunk_logits=chunk_logits)
    found = measure(session, tokens, toy_pass(tokens))
    assert session.chunks.count(64) >= 1
    assert found.steps.tokens == 72
    assert found.twin.logits.relative_max < 1e-6
    assert found.steps.logits.relative_max < 1e-6
    assert found.steps.states[0].relative_max < 1e-6
    assert found.same_position


def test_a_text_is_taken_in_whole_chunks_where_these_give_all_logits() -> None:
    session = WholeChunksSession(chunk_logits=True)
    measure(session, np.resize(TOKENS, 1000), toy_pass(np.resize(TOKENS, 1000)))
    assert session.chunks.count(64) == 928 // 64 + 1 + 1, "text, last tokens, and those again"


def _wrong_logits(session: ToySession, logits: np.ndarray) -> np.ndarray:
    return 2 * logits


def _lost_state(session: ToySession, logits: np.ndarray) -> np.ndarray:
    session.h *= np.float32(0)
    return logits


@pytest.mark.parametrize("chunk_logits", [True, False])
@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("fault", [_wrong_logits, _lost_state])
def test_a_wrong_program_for_chunks_is_seen(fault: Fault, length: int, chunk_logits: bool) -> None:
    """Also where the text itself was taken without it."""
    session = WholeChunksSession(chunk_logits=chunk_logits, chunk_fault=fault)
    found = measure(session, TOKENS[:length], toy_pass(TOKENS[:length]))
    assert found.steps.logits.relative_max > 0.1
    if length == 20 or not chunk_logits:
        assert found.twin.logits.relative_max < 1e-6
