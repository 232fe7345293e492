"""Measures of sessions that are toys: right ones, and ones with a fault."""

from collections.abc import Callable

import numpy as np
import pytest

from rgexport.griffin.state import POSITION, State
from rgexport.validate import measure as module
from rgexport.validate import speed
from rgexport.validate.continuations import (
    LEAST_TOKENS,
    MOST_TOKENS,
    SHOWN,
    continuations,
    prompts_of_file,
    prompts_of_model,
)
from rgexport.validate.measure import Measurement, measure, whole_chunks, with_continuations
from rgexport.validate.positions import BLOCKS, WORST
from rgexport.validate.report.words import answers_of
from rgexport.validate.speed import Speed, measure_speed
from tests.validate.toys import (
    MEMORY,
    VOCAB,
    ToySession,
    WholeChunksSession,
    WholeToy,
    character_tokenizer,
    file_of,
    greedy,
    toy_pass,
)

TOKENS = np.random.default_rng(9).integers(0, VOCAB, 100)
LONGER = np.random.default_rng(4).integers(0, VOCAB, 150)


def measured(session: ToySession, tokens: np.ndarray = TOKENS) -> Measurement:
    return measure(session, tokens, [toy_pass(tokens)])


def differing(session: ToySession) -> set[str]:
    """The equivalences that a session does not keep."""
    equivalences = measure(session, LONGER, []).equivalences
    assert list(equivalences) == ["steps", "ragged", "restored", "reset"]
    return {n for n, found in equivalences.items() if not found.logits.relative_max < 1e-6}


def lost_state(session: ToySession, logits: np.ndarray) -> np.ndarray:
    session.h[:] = 0
    return logits


def test_a_right_session_differs_from_another_model_only():
    passes = [toy_pass(TOKENS), toy_pass(TOKENS, seed=1)]
    found = with_continuations(measure(ToySession(), TOKENS, passes), passes)
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
    assert right.greedy_tokens == right.greedy_common == module.GREEDY_TOKENS
    ours, theirs = (greedy(seed, TOKENS, module.GREEDY_TOKENS) for seed in (0, 1))
    assert wrong.greedy_common == np.argmin(ours == theirs) < module.GREEDY_TOKENS


@pytest.mark.parametrize("length", [1, 8, 9, 40])
@pytest.mark.parametrize("limit", [1, 12 * 2 * 4 * VOCAB])
def test_blocks_cover_the_text_once(length, limit, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    session = ToySession()
    found = measured(session, TOKENS[:length])
    assert found.equivalences["steps"].tokens == min(8, length)
    ends = np.cumsum(session.chunks)
    assert length in ends and max(session.chunks) <= (8 if limit == 1 else 12)
    assert found.comparisons[0].logits.relative_max < 1e-6


def test_a_lost_state_a_lost_position_and_nan_are_seen(monkeypatch):
    def broken(session: ToySession, logits: np.ndarray) -> np.ndarray:
        session.position = session.position - 1
        logits[..., 3] = np.nan
        return logits

    found = measured(ToySession(fault=broken))
    assert not found.counted
    assert found.comparisons[0].logits.non_finite_positions == len(TOKENS)
    assert np.isnan(found.comparisons[0].logits.relative_max)
    monkeypatch.setattr(module, "MAX_BLOCK", 10)
    found = measured(ToySession(fault=lost_state))
    assert found.comparisons[0].logits.relative_max > 0.1
    assert found.comparisons[0].states[0].relative_max == 1
    assert found.equivalences["steps"].logits.relative_max > 0.1


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
    positions = [63, 64, 100, 128]
    assert whole_chunks(WholeChunksSession(chunk_logits=True), positions) == {64, 128}
    assert whole_chunks(ToySession(), positions) == {*positions}


@pytest.mark.parametrize("chunk_logits", [True, False])
@pytest.mark.parametrize("length", [1, 64, 71, 100, 1000])
def test_a_chunk_of_fixed_length_is_taken_for_any_text(length, chunk_logits):
    session = WholeChunksSession(chunk_logits=chunk_logits)
    found = measured(session, np.resize(TOKENS, length))
    assert session.chunks.count(64) >= 1
    if chunk_logits and length == 1000:
        assert session.chunks.count(64) == 928 // 64 + 1 + 3, "the text, and its last tokens again"
    assert found.equivalences["steps"].tokens == 72
    assert found.comparisons[0].logits.relative_max < 1e-6
    assert found.equivalences["steps"].logits.relative_max < 1e-6
    assert found.equivalences["steps"].states[0].relative_max < 1e-6
    assert found.counted


@pytest.mark.parametrize("chunk_logits", [True, False])
@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("fault", [lambda session, logits: 2 * logits, lost_state])
def test_a_wrong_program_for_chunks_is_seen(fault, length, chunk_logits):
    """Also where the text itself was taken without it."""
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
        self.h = self.h + np.float32(0.1) * before


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
    ],
)
def test_equivalences_that_a_session_does_not_keep(session, expected):
    assert differing(session) == expected


# ---- Continuations --------------------------------------------------------------------------


def spell(ids: np.ndarray) -> str:
    return " ".join(map(str, ids))


def test_each_model_continues_greedily():
    tokens = np.array([1, 5, 7, 2])
    prompts = prompts_of_file(file_of(0, [("a", tokens, 20)]))
    (same,) = continuations(ToySession(0), prompts, spell)
    assert (same.prompt, same.tokens, same.common) == ("5 7 2", 20, 20)
    assert same.reference == same.artifact == spell(greedy(0, tokens, 20))
    (other,) = continuations(ToySession(1), prompts, spell)
    assert other.reference == same.reference
    assert other.artifact == spell(greedy(1, tokens, 20))
    pairs = list(zip(other.reference.split(), other.artifact.split(), strict=True))
    assert all(a == b for a, b in pairs[: other.common])
    assert (other.reference_next, other.artifact_next) == pairs[other.common]
    assert other.reference_next != other.artifact_next
    for answer, text in zip(answers_of(other), (other.reference, other.artifact), strict=True):
        assert answer.shared == other.shared
        assert answer.shared.split() == text.split()[: other.common]
        assert text.startswith(answer.shared) and text.endswith(answer.rest) and answer.differing


def test_prompts_that_are_continued():
    """Of a file, the first with an answer that is not short; of a model, the built-in ones."""
    tokens = np.array([1, 5])
    prompts = [("short", tokens, LEAST_TOKENS - 1), ("empty", tokens[:1], 32)]
    prompts += [(f"p{i}", tokens, 32) for i in range(SHOWN + 1)]
    chosen = prompts_of_file(file_of(0, prompts))
    assert [one.name for one in chosen] == [f"p{i}" for i in range(SHOWN)]
    built_in = prompts_of_model(WholeToy(3), character_tokenizer())
    assert [prompt.name for prompt in built_in] == ["prose", "code", "chat turns"]
    for prompt in built_in:
        assert prompt.tokens[0] == 0 and len(prompt.greedy) == MOST_TOKENS
        np.testing.assert_array_equal(prompt.greedy, greedy(3, prompt.tokens, MOST_TOKENS))


# ---- Speed ----------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch) -> Callable[..., Speed]:
    """Measures a session whose every token takes some seconds, and a seventh call much longer."""

    def measure_toy(session: ToySession, per_token: float) -> Speed:
        calls: list[float] = []

        def seconds(run: Callable[[], None]) -> float:
            before = len(session.chunks)
            run()
            calls.append(per_token * sum(session.chunks[before:]))
            return 0.9 if per_token < 0.01 and len(calls) % 7 == 0 else calls[-1]

        session.close = lambda: monkeypatch.setattr(session, "closed", True, raising=False)
        monkeypatch.setattr(speed, "open_session", lambda artifact: session)
        monkeypatch.setattr(speed, "seconds", seconds)
        return measure_speed(None)  # the session is a toy's

    return measure_toy


def test_rates_are_those_of_the_calls(timed):
    session = ToySession()
    assert timed(session, 0.25) == Speed(decode=4, prefill=4, prompt_tokens=128)
    # Eight steps take the two seconds, first to warm up; a prompt alone takes more.
    assert session.chunks == [1] * 16 + [128] and session.closed
    slow = WholeChunksSession(chunk_logits=True)
    assert timed(slow, 20) == Speed(decode=1 / 20, prefill=1 / 20, prompt_tokens=64)
    assert slow.chunks == [1, 1, 64], "a slow engine takes two tokens and a chunk"
    fast = timed(ToySession(), 0.001)
    assert (fast.decode, fast.prefill) == pytest.approx((1000, 1000)), "odd calls do not count"


def test_a_session_is_closed_after_an_error(timed):
    def fail(session: ToySession, logits: object) -> None:
        raise RuntimeError("the engine broke")

    session = ToySession(fault=fail)
    with pytest.raises(RuntimeError, match="the engine broke"):
        timed(session, 1)
    assert session.closed
