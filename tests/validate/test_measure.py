from dataclasses import replace

import numpy as np
import pytest

from rgexport.griffin.state import POSITION, State
from rgexport.validate import measure as module
from rgexport.validate.equivalences import Equivalence
from rgexport.validate.measure import measure, whole_chunks, with_continuations
from rgexport.validate.positions import BLOCKS, WORST
from tests.validate.toys import MEMORY, VOCAB, ToySession, WholeChunksSession, toy_pass

TOKENS = np.random.default_rng(9).integers(0, VOCAB, 100)


def test_a_right_session_differs_from_another_model_only():
    found = measure(ToySession(), TOKENS, [toy_pass(TOKENS), toy_pass(TOKENS, seed=1)])
    right, wrong = found.comparisons
    assert right.logits.relative_max < 1e-6
    assert right.kl.max < 1e-10 and wrong.kl.mean > 0.1
    assert right.agreement.top1 == 1 and wrong.agreement.top1 < 0.9
    assert right.likelihood.tokens == 99
    assert [s.name for s in right.states] == [MEMORY]
    assert right.states[0].relative_max < 1e-6 and wrong.states[0].relative_max > 0.1
    assert found.counted and found.state[POSITION].tolist() == [len(TOKENS)]
    for side in (right, wrong):
        assert len(side.blocks) == min(BLOCKS, len(TOKENS)) and len(side.worst) == WORST
        assert side.worst[0].position == side.kl.worst_position
        assert side.worst[0].kl == side.kl.max
        assert side.worst[0].next_token == TOKENS[side.worst[0].position + 1]
    assert np.allclose(found.state[MEMORY], toy_pass(TOKENS).state[MEMORY])


@pytest.mark.parametrize("length", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("limit", [1, 12 * 2 * 4 * VOCAB])
def test_blocks_cover_the_text_once(length, limit, monkeypatch):
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


def test_a_state_that_is_lost_between_chunks_is_seen(monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 10)
    found = measure(ToySession(fault=lost_state), TOKENS, [toy_pass(TOKENS)])
    assert found.comparisons[0].logits.relative_max > 0.1
    assert found.comparisons[0].states[0].relative_max == 1
    assert found.equivalences["steps"].logits.relative_max > 0.1


def test_a_lost_position_and_nan_reach_the_result():
    def broken(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.position = session.position - 1
        logits[..., 3] = np.nan
        return logits

    found = measure(ToySession(fault=broken), TOKENS, [toy_pass(TOKENS)])
    assert not found.counted
    assert found.comparisons[0].logits.non_finite_positions == len(TOKENS)
    assert np.isnan(found.comparisons[0].logits.relative_max)


def test_states_are_compared_along_the_text():
    def leak(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.h *= np.float32(1.01)
        return logits

    tokens = np.resize(TOKENS, 300)
    (right,) = measure(ToySession(), tokens, [toy_pass(tokens)]).comparisons
    assert [found.position for found in right.drift] == [64, 128, 256]
    assert max(found.states[0].relative_max for found in right.drift) < 1e-6
    (wrong,) = measure(ToySession(fault=leak), tokens, [toy_pass(tokens)]).comparisons
    assert min(found.states[0].relative_max for found in wrong.drift) > 5e-3


def test_the_greedy_text_in_common():
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
@pytest.mark.parametrize("length", [1, 5, 64, 71, 72, 100, 1000])
def test_a_chunk_of_fixed_length_is_taken_for_any_text(length, chunk_logits):
    tokens = np.resize(TOKENS, length)
    session = WholeChunksSession(chunk_logits=chunk_logits)
    found = measure(session, tokens, [toy_pass(tokens)])
    assert session.chunks.count(64) >= 1
    if chunk_logits and length == 1000:
        assert session.chunks.count(64) == 928 // 64 + 1 + 3, "the text, and its last tokens again"
    assert found.equivalences["steps"].tokens == 72
    assert found.comparisons[0].logits.relative_max < 1e-6
    assert found.equivalences["steps"].logits.relative_max < 1e-6
    assert found.equivalences["steps"].states[0].relative_max < 1e-6
    assert found.counted


def test_states_are_compared_only_where_no_chunk_of_fixed_length_is_cut():
    positions = [63, 64, 100, 128]
    assert whole_chunks(WholeChunksSession(chunk_logits=True), positions) == {64, 128}
    assert whole_chunks(ToySession(), positions) == {*positions}


def lost_state(session: ToySession, logits: np.ndarray) -> np.ndarray:
    session.h[:] = 0
    return logits


@pytest.mark.parametrize("chunk_logits", [True, False])
@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("fault", [lambda session, logits: 2 * logits, lost_state])
def test_a_wrong_program_for_chunks_is_seen(fault, length, chunk_logits):
    """Also where the text itself was taken without it."""
    session = WholeChunksSession(chunk_logits=chunk_logits, chunk_fault=fault)
    found = measure(session, TOKENS[:length], [toy_pass(TOKENS[:length])])
    assert found.equivalences["steps"].logits.relative_max > 0.1
    if length == 20 or not chunk_logits:
        assert found.comparisons[0].logits.relative_max < 1e-6


LONGER = np.random.default_rng(4).integers(0, VOCAB, 150)


def same(session: ToySession) -> dict[str, Equivalence]:
    return measure(session, LONGER, []).equivalences


def differing(equivalences: dict[str, Equivalence]) -> set[str]:
    return {name for name, found in equivalences.items() if not found.logits.relative_max < 1e-6}


@pytest.mark.parametrize("chunk_logits", [True, False])
def test_a_right_session_gives_the_same(chunk_logits):
    for session in (ToySession(), WholeChunksSession(chunk_logits=chunk_logits)):
        found = same(session)
        assert list(found) == ["steps", "ragged", "restored", "reset"]
        assert differing(found) == set()
        assert all(found[n].states[0].relative_max < 1e-6 for n in ("steps", "ragged", "restored"))


@pytest.mark.parametrize(("length", "seen"), [(2, {"ragged"}), (1, {"steps", "ragged"})])
def test_chunks_of_a_length_that_are_wrong(length, seen):
    session = ToySession(fault=lambda session, logits: logits + (session.chunks[-1] == length))
    assert differing(same(session)) == seen


class Forgetful(ToySession):
    """Restores a state as far as it is at hand."""

    def set_state(self, state: State) -> None:
        super().set_state({MEMORY: state[MEMORY] * np.float32(0.9), POSITION: state[POSITION]})


class Clinging(ToySession):
    """Does not forget all."""

    def reset(self, batch: int = 1) -> None:
        before = getattr(self, "h", 0)
        super().reset(batch)
        self.h = self.h + np.float32(0.1) * before


def test_a_state_that_is_not_restored_and_a_reset_that_leaves_something():
    assert differing(same(Forgetful())) == {"steps", "ragged", "restored"}
    assert differing(same(Clinging())) == {"reset"}


def test_ragged_chunks_hold_a_whole_chunk_at_another_offset():
    session = WholeChunksSession(chunk_logits=True)
    same(session)
    assert (3, 64) in {
        (sum(session.chunks[i - 3 : i]), size) for i, size in enumerate(session.chunks) if i >= 3
    }


def test_tokens_after_a_short_chunk_keep_their_logits():
    """A second chunk instead of single tokens would leave one row of logits to compare."""
    session = WholeChunksSession(chunk_logits=False)
    session.info = replace(session.info, prefill_chunk=7)
    same(session)
    after = {session.chunks[i + 1] for i, size in enumerate(session.chunks[:-1]) if size == 7}
    assert after == {1}
