"""Measures of sessions that are toys: right ones, and ones with a fault."""

import numpy as np
import pytest

from rgexport.griffin.state import POSITION, State
from rgexport.validate.measure import BLOCKS, WORST, measure
from tests.validate.toys import MEMORY, VOCAB, ToySession, WholeChunksSession, toy_pass

TOKENS = np.random.default_rng(9).integers(0, VOCAB, 100)
LONGER = np.random.default_rng(4).integers(0, VOCAB, 150)


def measured(session: ToySession, tokens: np.ndarray = TOKENS):
    return measure(session, tokens, [toy_pass(tokens)], longest=8)


def lost_state(session: ToySession, logits: np.ndarray) -> np.ndarray:
    session.h[:] = 0
    return logits


def test_a_right_session_differs_from_another_model_only():
    passes = [toy_pass(TOKENS), toy_pass(TOKENS, seed=1)]
    found = measure(ToySession(), TOKENS, passes)
    right, wrong = found.comparisons
    assert right.logits.relative_max < 1e-6
    assert right.kl.max < 1e-10 and wrong.kl.mean > 0.1
    assert right.agreement.top1 == 1 and wrong.agreement.top1 < 0.9
    assert right.likelihood.tokens == 99
    assert [s.name for s in right.states] == [MEMORY]
    assert right.states[0].relative_max < 1e-6 and wrong.states[0].relative_max > 0.1
    assert found.counted and found.ending.chunk.state[POSITION].tolist() == [len(TOKENS)]
    for side in (right, wrong):
        assert len(side.blocks) == min(BLOCKS, len(TOKENS)) and len(side.worst) == WORST
        assert side.worst[0].position == side.kl.worst_position
        assert side.worst[0].kl == side.kl.max
        assert side.worst[0].next_token == TOKENS[side.worst[0].position + 1]
    assert np.allclose(found.ending.chunk.state[MEMORY], toy_pass(TOKENS).state[MEMORY])


@pytest.mark.parametrize("length", [1, 8, 9, 40])
@pytest.mark.parametrize("limit", [1, 12 * 2 * 4 * VOCAB])
def test_blocks_cover_the_text_once(length, limit, monkeypatch):
    monkeypatch.setattr("rgexport.runtimes.session.LOGITS_BYTES", limit)
    session = ToySession()
    found = measured(session, TOKENS[:length])
    assert found.equivalences["steps"].tokens == min(8, length)
    ends = np.cumsum(session.chunks)
    assert length in ends and max(session.chunks) <= (8 if limit == 1 else 12)
    assert found.comparisons[0].logits.relative_max < 1e-6


def test_a_lost_position_and_nan_are_seen():
    def broken(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.position = session.position - 1
        logits[..., 3] = np.nan
        return logits

    found = measured(ToySession(fault=broken))
    assert not found.counted
    assert found.comparisons[0].logits.non_finite_positions == len(TOKENS)
    assert np.isnan(found.comparisons[0].logits.relative_max)


def test_states_are_compared_along_the_text():
    def leak(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.h *= np.float32(1.01)
        return logits

    tokens = np.resize(TOKENS, 300)
    (right,) = measured(ToySession(), tokens).comparisons
    assert [found.position for found in right.drift] == [64, 128, 256]
    assert max(found.states[0].relative_max for found in right.drift) < 1e-6
    (wrong,) = measured(ToySession(fault=leak), tokens).comparisons
    assert min(found.states[0].relative_max for found in wrong.drift) > 5e-3


@pytest.mark.parametrize("chunk_logits", [True, False])
@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("fault", [lambda session, logits: 2 * logits, lost_state])
def test_a_wrong_program_for_chunks_is_seen(fault, length, chunk_logits):
    """Also where the text itself was taken without it."""
    right = WholeChunksSession(chunk_logits=chunk_logits)
    found = measured(right, TOKENS[:length])
    assert right.chunks.count(64) >= 1 and found.equivalences["steps"].tokens == 72
    assert found.counted and found.comparisons[0].logits.relative_max < 1e-6
    session = WholeChunksSession(chunk_logits=chunk_logits, chunk_fault=fault)
    found = measured(session, TOKENS[:length])
    assert found.equivalences["steps"].logits.relative_max > 0.1
    if length == 20 or not chunk_logits:
        assert found.comparisons[0].logits.relative_max < 1e-6


class Forgetful(ToySession):
    """Restores a state as far as it is at hand."""

    def set_state(self, state: State) -> None:
        super().set_state({MEMORY: state[MEMORY] * np.float32(0.9), POSITION: state[POSITION]})


class Clinging(ToySession):
    """Does not forget all."""

    def reset(self, batch: int = 1) -> None:
        before = getattr(self, "h", 0)
        super().reset(batch)
        self.h, self.position = self.h + np.float32(0.1) * before, self.position + np.any(before)


class Late(ToySession):
    def set_state(self, state: State) -> None:
        super().set_state(state | {POSITION: state[POSITION] + 1})


def _wrong_chunks(length: int) -> ToySession:
    return ToySession(fault=lambda session, logits: logits + (session.chunks[-1] == length))


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        (ToySession(), set()),
        (WholeChunksSession(chunk_logits=True), set()),
        (WholeChunksSession(chunk_logits=False), set()),
        (_wrong_chunks(2), {"ragged"}),
        (_wrong_chunks(1), {"steps", "ragged"}),
        (Forgetful(), {"steps", "ragged", "restored"}),
        (Clinging(), {"reset"}),
        (Late(), {"start"}),
        (ToySession(fault=lambda one, logits: np.copyto(one.h, one.h[:1]) or logits), {"batch"}),
        (_wrong_chunks(len(LONGER)), {"long"}),
    ],
)
def test_equivalences_that_a_session_does_not_keep(session, expected):
    equivalences = measure(session, LONGER, []).equivalences
    chunks = [] if session.info.whole_chunks else ["long", "batch"]
    assert list(equivalences) == ["steps", "ragged", "restored", "reset", "start", *chunks]
    assert {n for n, one in equivalences.items() if not one.logits.relative_max < 1e-6} == expected
