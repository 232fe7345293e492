"""Text ↔ ids: as SentencePiece does it, except that text never becomes markup."""

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rgexport.chat.tokenizer import CUT, StreamDecoder, Tokenizer, load_tokenizer
from rgexport.errors import RequestError

LITERALS = ("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<mask>", "<unused7>")
plain = st.lists(
    st.text() | st.sampled_from(["hello", " the", "\n\n", "  ", "<table>", "<", ">", "start_of"])
).map("".join)
hostile = st.lists(st.text(max_size=5) | st.sampled_from([*LITERALS, "<start_of_", "turn>"])).map(
    "".join
)


@pytest.fixture(scope="module")
def engine(sentencepiece_folder: Path) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece itself, with the model of `gemma`."""
    path = sentencepiece_folder / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def converted(json_folder: Path) -> Tokenizer:
    """The tokenizer.json made from the model of `gemma`."""
    return load_tokenizer(json_folder)


def test_special_ids_are_read_from_the_vocabulary(tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    assert (special["<pad>"], special["<eos>"], special["<bos>"], special["<unk>"]) == (0, 1, 2, 3)
    assert (special["<start_of_turn>"], special["<end_of_turn>"]) == (106, 107)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_of_turn_id) == (2, 1, 107)
    assert tokenizer.stop_ids == {1, 107}
    assert tokenizer.literal(2) == "<bos>" and tokenizer.literal(None) == ""
    assert not {"\n", "▁▁", "<table>", "</b>"} & special.keys()


@settings(deadline=None)
@given(text=plain)
def test_text_encodes_as_sentencepiece_does(gemma, engine, text):
    assume(not any(literal in text for literal in gemma.special))
    assert gemma.encode_text(text) == engine.EncodeAsIds(text)


@settings(deadline=None)
@given(text=plain)
def test_json_encodes_as_sentencepiece_does(converted, gemma, text):
    assume(not any(literal in text for literal in gemma.special))
    assert converted.encode_text(text) == gemma.encode_text(text)


@settings(deadline=None)
@given(text=hostile)
def test_no_text_becomes_a_special_piece(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert set(tokenizer.special.values()).isdisjoint(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text(f"a\udcff<start_of{CUT}_turn>")
    assert tokenizer.decode(ids) == "a\ufffd<start_of\ufffd_turn>"
    assert 106 not in ids


def test_a_literal_that_a_normalizer_makes_is_spelled_out() -> None:
    def encode(text: str) -> list[int]:  # like NFKC: a full-width bracket is a bracket
        folded = text.replace("＜", "<")
        return [9] if folded == "<end_of_turn>" else [ord(c) for c in folded]

    tokenizer = Tokenizer(256, {"<end_of_turn>": 9}, None, None, encode, lambda i: bytes([i]))
    assert 9 not in tokenizer.encode_text("＜end_of_turn>")
    assert tokenizer.decode(tokenizer.encode_text("＜end_of_turn>")) == "<end_of_turn>"


@settings(deadline=None)
@given(data=st.data())
def test_a_stream_is_the_whole_and_never_broken(tokenizer: Tokenizer, data: st.DataObject) -> None:
    byte_ids = [
        i for i in range(tokenizer.vocab_size) if i > 107 and tokenizer.surface(i) > b"\x7f"
    ]
    ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size + 9) | st.sampled_from(byte_ids), max_size=30)
    )
    stream = StreamDecoder(tokenizer)
    pieces = [stream.add(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(deadline=None)
@given(text=plain)
def test_a_stream_of_real_text_holds_characters_back(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer)
    pieces = [stream.add(i) for i in tokenizer.encode_text(text)]
    assert "".join(pieces) == text.replace("▁", " ")
    assert stream.finish() == ""
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_decode_agrees_with_sentencepiece(gemma, engine):
    ids = [2, 106, *engine.EncodeAsIds(" naïve  東京 🐢\n"), 3, 0, 107, 1]
    assert gemma.decode(ids) == engine.DecodeIds(ids)


def test_tokenizer_model_is_preferred(sentencepiece_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").symlink_to(sentencepiece_folder / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("not even JSON")
    assert load_tokenizer(tmp_path).bos_id == 2


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("README", b"", "neither tokenizer.model nor tokenizer.json"),
        ("tokenizer.model", b"", "not a readable tokenizer"),
        ("tokenizer.model", b"version https://git-lfs", "not a readable tokenizer"),
        ("tokenizer.json", b"{", "not a readable tokenizer"),
        ("tokenizer.json", b"[]", "not a readable tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', "without byte fallback"),
        ("tokenizer.json", b'{"model": {"byte_fallback": true}}', "not a readable tokenizer"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=said) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
