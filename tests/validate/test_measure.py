import numpy as np
import pytest

from rgexport.griffin.state import POSITION
from rgexport.validate import measure as module
from rgexport.validate.measure import measure, whole_chunks, with_continuations
from rgexport.validate.positions import BLOCKS, WORST
from tests.validate.toys import MEMORY, VOCAB, Fault, ToySession, WholeChunksSession, toy_pass

TOKENS = np.random.default_rng(9).integers(0, VOCAB, 100)


def test_a_right_session_differs_from_another_model_only() -> None:
    found = measure(ToySession(), TOKENS, [toy_pass(TOKENS), toy_pass(TOKENS, seed=1)])
    right, wrong = found.comparisons
    assert right.logits.relative_max < 1e-6
    assert right.kl.max < 1e-10 and wrong.kl.mean > 0.1
    assert right.agreement.top1 == 1 and wrong.agreement.top1 < 0.9
    assert right.likelihood is not None and right.likelihood.tokens == 99
    assert [s.name for s in right.states] == [MEMORY]
    assert right.states[0].relative_max < 1e-6 and wrong.states[0].relative_max > 0.1
    assert found.counted and found.state[POSITION].tolist() == [len(TOKENS)]
    for side in (right, wrong):
        assert len(side.blocks) == BLOCKS and len(side.worst) == WORST
        assert side.worst[0].position == side.kl.worst_position
        assert side.worst[0].kl == side.kl.max
        assert side.worst[0].next_token == TOKENS[side.worst[0].position + 1]
    assert np.allclose(found.state[MEMORY], toy_pass(TOKENS).state[MEMORY])


@pytest.mark.parametrize("length", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("limit", [1, 12 * 2 * 4 * VOCAB])
def test_blocks_cover_the_text_once(
    length: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    session = ToySession()
    found = measure(session, TOKENS[:length], [toy_pass(TOKENS[:length])])
    steps = found.equivalences["steps"].tokens
    assert steps == min(8, length)
    once, taken = 0, iter(session.chunks)
    while once < length:
        once += next(taken)
    assert once == length
    again = list(taken)
    assert sum(again) == module.GREEDY_TOKENS - 1 + 3 * steps + min(
        8, length - 8 if length > 8 else 8, length
    ), "its own continuation; the last tokens as before, as steps, and ragged; the first ones"
    assert max(session.chunks) <= (8 if limit == 1 else 12)
    assert found.comparisons[0].logits.relative_max < 1e-6


def test_a_state_that_is_lost_between_chunks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.h[:] = 0
        return logits

    monkeypatch.setattr(module, "MAX_BLOCK", 10)
    found = measure(ToySession(fault=forget), TOKENS, [toy_pass(TOKENS)])
    assert found.comparisons[0].logits.relative_max > 0.1
    assert found.comparisons[0].states[0].relative_max == 1
    assert found.equivalences["steps"].logits.relative_max > 0.1


def test_a_lost_position_and_nan_reach_the_result() -> None:
    def broken(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.position = session.position - 1
        logits[..., 3] = np.nan
        return logits

    found = measure(ToySession(fault=broken), TOKENS, [toy_pass(TOKENS)])
    assert not found.counted
    assert found.comparisons[0].logits.non_finite_positions == len(TOKENS)
    assert np.isnan(found.comparisons[0].logits.relative_max)


def test_states_are_compared_along_the_text() -> None:
    def leak(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.h *= np.float32(1.01)
        return logits

    tokens = np.resize(TOKENS, 300)
    (right,) = measure(ToySession(), tokens, [toy_pass(tokens)]).comparisons
    assert [found.position for found in right.drift] == [64, 128, 256]
    assert max(found.states[0].relative_max for found in right.drift) < 1e-6
    (wrong,) = measure(ToySession(fault=leak), tokens, [toy_pass(tokens)]).comparisons
    assert min(found.states[0].relative_max for found in wrong.drift) > 5e-3


def test_the_greedy_text_in_common() -> None:
    passes = [toy_pass(TOKENS), toy_pass(TOKENS, seed=1)]
    found = with_continuations(measure(ToySession(), TOKENS, passes), passes)
    right, wrong = found.comparisons
    assert right.greedy_tokens == right.greedy_common == module.GREEDY_TOKENS
    one, other, expected = ToySession(), ToySession(seed=1), 0
    ours, theirs = one.prefill(TOKENS[None])[:, 0], other.prefill(TOKENS[None])[:, 0]
    while ours.argmax() == theirs.argmax() and expected < module.GREEDY_TOKENS:
        expected += 1
        ours, theirs = one.step(ours.argmax(1)), other.step(theirs.argmax(1))
    assert wrong.greedy_common == expected < module.GREEDY_TOKENS


@pytest.mark.parametrize("chunk_logits", [True, False])
@pytest.mark.parametrize("length", [1, 5, 64, 71, 72, 100, 300])
def test_a_chunk_of_fixed_length_is_taken_for_any_text(length: int, chunk_logits: bool) -> None:
    tokens = np.resize(TOKENS, length)
    session = WholeChunksSession(chunk_logits=chunk_logits)
    found = measure(session, tokens, [toy_pass(tokens)])
    repeats = 1 + 3 if chunk_logits else 1  # beside the text, its last tokens again
    assert session.chunks.count(64) >= 1
    assert (
        not chunk_logits or length < 72 or session.chunks.count(64) == (length - 72) // 64 + repeats
    )
    assert found.equivalences["steps"].tokens == 72
    assert found.comparisons[0].logits.relative_max < 1e-6
    assert found.equivalences["steps"].logits.relative_max < 1e-6
    assert found.equivalences["steps"].states[0].relative_max < 1e-6
    assert found.counted


def test_states_are_compared_only_where_no_chunk_of_fixed_length_is_cut() -> None:
    positions = [63, 64, 100, 128]
    assert whole_chunks(WholeChunksSession(chunk_logits=True), positions) == {64, 128}
    assert whole_chunks(ToySession(), positions) == {*positions}


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
    found = measure(session, TOKENS[:length], [toy_pass(TOKENS[:length])])
    assert found.equivalences["steps"].logits.relative_max > 0.1
    if length == 20 or not chunk_logits:
        assert found.comparisons[0].logits.relative_max < 1e-6
