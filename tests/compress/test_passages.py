"""Sequences of a calibration text, and how they are taken together."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.chat.tokenizer import load_tokenizer
from rgexport.compress.passages import LENGTH, Passages, join, read_text
from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import demo_folder

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=12)


def text_of(lengths: list[int]) -> Passages:
    return Passages(np.arange(sum(lengths), dtype=np.int32), np.array(lengths, np.int32))


@given(LENGTHS, st.integers(1, 12))
def test_batches_hold_each_sequence_once_and_whole(lengths: list[int], most: int) -> None:
    found, end = [], 0
    for place, (count, length) in text_of(lengths).batches(most):
        assert place.start == end and place.stop - place.start == count * length
        assert count * length <= most or count == 1
        found += [length] * count
        end = place.stop
    assert found == lengths


@given(LENGTHS, st.integers(1, 40))
def test_the_first_tokens_are_whole_sequences(lengths: list[int], tokens: int) -> None:
    first = text_of(lengths).first(tokens)
    count = len(first.lengths)
    assert first.lengths.tolist() == lengths[:count]
    assert len(first.tokens) == sum(lengths[:count])
    assert len(first.tokens) <= tokens or count == 1
    assert count == len(lengths) or sum(lengths[: count + 1]) > tokens


@given(LENGTHS, st.integers(0, 12))
def test_the_last_sequences_are_held_out(lengths: list[int], count: int) -> None:
    count = min(count, len(lengths))
    text = text_of(lengths)
    used, rest = text.without_last(count)
    assert used.lengths.tolist() == lengths[: len(lengths) - count]
    assert len(rest.lengths) == count
    np.testing.assert_array_equal(np.concatenate([used.tokens, rest.tokens]), text.tokens)
    assert len(used.tokens) == used.lengths.sum()


def test_joining_keeps_every_sequence_and_mixes_their_order() -> None:
    parts = [np.full(3 + i % 2, i) for i in range(40)]
    text = join(parts, 0)
    found = np.split(text.tokens, np.cumsum(text.lengths)[:-1])
    order = [int(sequence[0]) for sequence in found]
    assert sorted(order) == list(range(40)) and order != sorted(order)
    assert all((s == s[0]).all() and len(s) == len(parts[s[0]]) for s in found)
    assert text.tokens.dtype == np.int32


@pytest.mark.parametrize("limit", [1, 2, 3, LENGTH, LENGTH + 1, LENGTH + 2, 1300])
def test_a_text_is_cut_into_sequences_that_begin_with_a_bos(tmp_path: Path, limit: int) -> None:
    tokenizer = load_tokenizer(demo_folder())
    words = "The tide turned in the harbour office at four. " * 300
    (tmp_path / "text").write_text(words)
    found = read_text(tmp_path / "text", tokenizer, limit)
    assert all(s[0] == tokenizer.bos_id and len(s) <= LENGTH for s in found)
    own = np.concatenate([s[1:] for s in found]).tolist()
    assert own == tokenizer.encode_text(words)[: len(own)]
    assert limit - 1 <= sum(map(len, found)) <= limit


def test_a_text_of_one_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder())
    (tmp_path / "text").write_text("a")
    (found,) = read_text(tmp_path / "text", tokenizer, 8192)
    assert found.tolist() == [tokenizer.bos_id, *tokenizer.encode_text("a")]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "has no text in it"), (b"\xff\xfe", "as UTF-8 text")]
)
def test_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_text(tmp_path / "text", load_tokenizer(demo_folder()), 100)
