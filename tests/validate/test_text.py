import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.validate import text as module
from rgexport.validate.text import built_in_text, choose_text, encode, random_text
from tests.validate.toys import VOCAB, character_tokenizer


def test_the_built_in_text_goes_past_a_long_window():
    found = choose_text(character_tokenizer(), vocab_size=VOCAB, window=7000)
    assert len(found.tokens) == 7000 + module.PAST_WINDOW
    once = len(built_in_text())
    assert np.array_equal(found.tokens[1 : 1 + 500], found.tokens[1 + once : 1 + once + 500])
    limited = choose_text(character_tokenizer(), vocab_size=VOCAB, window=7000, limit=300)
    assert len(limited.tokens) == 300 and limited.truncated
    longer = choose_text(character_tokenizer(), vocab_size=VOCAB, window=7, limit=32_768)
    assert len(longer.tokens) == 32_768, "as many as are asked for"


def test_a_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("déjà vu" * 100, "utf-8")
    whole = choose_text(character_tokenizer(), vocab_size=VOCAB, window=8, file=file)
    assert len(whole.tokens) == 701 and whole.bytes == 900 and not whole.truncated
    cut = choose_text(character_tokenizer(), vocab_size=VOCAB, window=8, file=file, limit=8)
    assert len(cut.tokens) == 8 and cut.bytes == 9 and cut.truncated
    assert np.array_equal(cut.tokens, whole.tokens[:8])


@given(text=st.text(max_size=60), limit=st.integers(2, 50), bos=st.sampled_from([None, 0]))
def test_cutting_keeps_the_limit_and_wastes_nothing(text, limit, bos):
    def pairs(part: str) -> list[int]:
        """One id for each character and one more for each pair: lengths jump."""
        return [7] * (len(part) + len(part) // 2)

    found = encode(pairs, bos, text, "t", limit)
    assert len(found.tokens) <= limit
    assert found.truncated == (len(pairs(text)) + (bos is not None) > limit)
    if found.truncated:
        assert len(found.tokens) >= limit - 2


def test_without_a_tokenizer_ids_are_random_and_repeatable():
    found = choose_text(None, vocab_size=50, window=100)
    assert len(found.tokens) == 401 and found.bytes is None
    assert found.tokens.min() >= 0 and found.tokens.max() < 50
    assert len(set(found.tokens.tolist())) == 50
    assert np.array_equal(found.tokens, random_text(50, 401).tokens)
    assert len(choose_text(None, vocab_size=50, window=100, limit=9000).tokens) == 9000


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot read"), (b"\xff\xfe\x00", "cannot read"), (b" \n", "has no text in it")],
)
def test_bad_files(tmp_path, content, complaint):
    file = tmp_path / "t"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RequestError, match=complaint):
        choose_text(character_tokenizer(), vocab_size=VOCAB, window=8, file=file)


def test_other_refusals(tmp_path):
    file = tmp_path / "t"
    file.write_text("text")
    with pytest.raises(RequestError, match="no tokenizer"):
        choose_text(None, vocab_size=VOCAB, window=8, file=file)
    with pytest.raises(RequestError, match="too few"):
        choose_text(None, vocab_size=VOCAB, window=8, limit=1)
    with pytest.raises(RequestError, match="the model has 5 tokens"):
        choose_text(character_tokenizer(), vocab_size=5, window=8, file=file)


def test_the_built_in_text_is_taken_whole(monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 10_000)
    found = choose_text(character_tokenizer(), vocab_size=VOCAB, window=256)
    assert len(found.tokens) == 1 + len(built_in_text())
    assert found.bytes == len(built_in_text().encode())
    assert not found.truncated and found.name == "built-in"
