from dataclasses import replace

import numpy as np
import pytest

from rgexport.griffin.state import POSITION, State
from rgexport.validate.equivalences import Equivalence
from rgexport.validate.measure import measure
from tests.validate.toys import MEMORY, VOCAB, Fault, ToySession, WholeChunksSession

TOKENS = np.random.default_rng(4).integers(0, VOCAB, 150)


def found(session: ToySession) -> dict[str, Equivalence]:
    return measure(session, TOKENS, []).equivalences


def wrong(same: dict[str, Equivalence]) -> set[str]:
    return {name for name, found in same.items() if not found.logits.relative_max < 1e-6}


@pytest.mark.parametrize("chunk_logits", [True, False])
def test_a_right_session_gives_the_same(chunk_logits: bool) -> None:
    for session in (ToySession(), WholeChunksSession(chunk_logits=chunk_logits)):
        same = found(session)
        assert list(same) == ["steps", "ragged", "restored", "reset"]
        assert wrong(same) == set()
        assert all(same[n].states[0].relative_max < 1e-6 for n in ("steps", "ragged", "restored"))


def _of_two(session: ToySession, logits: np.ndarray) -> np.ndarray:
    return logits + (session.chunks[-1] == 2)


def _of_one(session: ToySession, logits: np.ndarray) -> np.ndarray:
    return logits + (session.chunks[-1] == 1)


@pytest.mark.parametrize(("fault", "seen"), [(_of_two, {"ragged"}), (_of_one, {"steps", "ragged"})])
def test_chunks_of_a_length_that_are_wrong(fault: Fault, seen: set[str]) -> None:
    assert wrong(found(ToySession(fault=fault))) == seen


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


def test_a_state_that_is_not_restored() -> None:
    assert wrong(found(Forgetful())) == {"steps", "ragged", "restored"}


def test_a_reset_that_leaves_something() -> None:
    assert wrong(found(Clinging())) == {"reset"}


def test_ragged_chunks_hold_a_whole_chunk_at_another_offset() -> None:
    session = WholeChunksSession(chunk_logits=True)
    found(session)
    assert (3, 64) in {
        (sum(session.chunks[i - 3 : i]), size) for i, size in enumerate(session.chunks) if i >= 3
    }


def test_tokens_after_a_short_chunk_keep_their_logits() -> None:
    """A second chunk instead of single tokens would leave one row of logits to compare."""
    session = WholeChunksSession(chunk_logits=False)
    session.info = replace(session.info, prefill_chunk=7)
    found(session)
    after = {session.chunks[i + 1] for i, size in enumerate(session.chunks[:-1]) if size == 7}
    assert after == {1}
