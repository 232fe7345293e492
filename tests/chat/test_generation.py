"""Generation over a toy session."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rgexport.chat.generation import GenerationStats, generate, prompt_ids
from rgexport.chat.sampling import Sampler
from rgexport.chat.tokenizer import Tokenizer
from rgexport.errors import RequestError

MakeSession = Callable[[int], Any]


def test_greedy_is_the_argmax_of_one_growing_prefill(make_session: MakeSession) -> None:
    ids = [2, 5, 7]
    for token in generate(make_session(50), [2, 5, 7], Sampler(), 12, ()):
        expected = make_session(50).prefill(np.array([ids]))[0, -1].argmax()
        assert token == expected
        ids.append(token)
    assert len(ids) == 15


@pytest.mark.parametrize(("stop", "expected"), [((9,), [4, 5, 6]), ((1, 5), [4]), ((4,), [])])
def test_a_stop_id_ends_and_is_not_given(
    make_session: MakeSession, stop: tuple[int, ...], expected: list[int]
) -> None:
    session = make_session(50)
    session.script = [4, 5, 6, 9, 7]
    assert list(generate(session, [2], Sampler(), 10, stop)) == expected
    assert session.position.tolist() == [1 + len(expected)]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_costs_no_extra_step(make_session: MakeSession, limit: int) -> None:
    session = make_session(50)
    assert len(list(generate(session, [2, 3], Sampler(), limit, ()))) == limit
    assert session.fed == 2 + max(0, limit - 1)


def test_stats_count_what_was_done(make_session: MakeSession) -> None:
    stats = GenerationStats()
    assert (stats.prefill_rate, stats.decode_rate) == (0, 0)
    for _ in generate(make_session(50), [2, 3, 4], Sampler(), 5, (), stats):
        pass
    assert (stats.prompt_tokens, stats.new_tokens, stats.steps) == (3, 5, 4)
    assert stats.prefill_rate == 3 / stats.prefill_seconds
    assert stats.decode_rate == 4 / stats.decode_seconds


def test_a_prompt_starts_with_bos(tokenizer: Tokenizer) -> None:
    assert prompt_ids(tokenizer, "") == [2]
    assert prompt_ids(tokenizer, "hi <eos>") == [2, *tokenizer.encode_text("hi <eos>")]


def test_nothing_to_start_from(gemma: Tokenizer) -> None:
    bare = Tokenizer(256, {}, None, None, gemma.raw_encode, gemma.surface)
    with pytest.raises(RequestError, match="the prompt is empty"):
        prompt_ids(bare, "")


def test_an_id_that_the_model_lacks(make_session: MakeSession) -> None:
    with pytest.raises(RequestError, match="there is no token id 50: the model has 50 tokens"):
        next(generate(make_session(50), [2, 50], Sampler(), 5, ()))
