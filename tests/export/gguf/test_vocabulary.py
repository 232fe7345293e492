"""The vocabulary in a GGUF file: its pieces against SentencePiece's, and what is refused.

How llama.cpp splits text by it is tested in tests/chat/test_gguf_text.py.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from rgexport.errors import RequestError
from rgexport.export.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from rgexport.export.tokenizer_json import write_tokenizer_json
from rgexport.griffin.checkpoint import demo_folder

DEMO = demo_folder() / "tokenizer.model"
SIZE = 8192


@pytest.fixture(scope="module")
def engine() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(DEMO))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read(DEMO)


def read(path: Path, size: int = SIZE) -> Vocabulary:
    found = read_vocabulary([path], size)
    assert found is not None
    return found


def changed(folder: Path, change: Callable[[ModelProto], object]) -> Path:
    """The demo's model after a change."""
    model = ModelProto.FromString(DEMO.read_bytes())
    change(model)
    path = folder / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return path


def test_pieces_scores_and_ids_are_those_of_sentencepiece(engine, vocabulary):
    assert len(vocabulary.tokens) == len(vocabulary.types) == SIZE
    for index in range(SIZE):
        assert vocabulary.tokens[index] == engine.IdToPiece(index)
        assert vocabulary.scores[index] == engine.GetScore(index)
        assert (vocabulary.types[index] == BYTE) == engine.IsByte(index)
    control = vocabulary.control
    tokens = control.pad, control.eos, control.bos, control.unk, control.end_of_turn
    assert [token and token.id for token in tokens] == [0, 1, 2, 3, 107]
    assert not vocabulary.add_space_prefix
    assert vocabulary.scores.dtype == np.float32 and vocabulary.types.dtype == np.int32


def test_markup_is_control_and_text_is_not(vocabulary):
    types = dict(zip(vocabulary.tokens, vocabulary.types.tolist(), strict=True))
    markup = "<pad> <eos> <bos> <mask> <2mass> [@BOS@] <unused0> <start_of_turn> <end_of_turn>"
    assert {types[piece] for piece in markup.split()} == {CONTROL}
    assert types["<unk>"] == UNKNOWN
    assert {types[piece] for piece in ("<table>", "</s>", "<h1>", "\n", "\n\n")} == {USER_DEFINED}
    assert {types[piece] for piece in ("▁▁", "▁" * 31, "▁the", "in")} == {NORMAL}


def test_json_has_the_same_pieces_in_the_same_order_of_scores(vocabulary, tmp_path):
    path = tmp_path / "tokenizer.json"
    write_tokenizer_json(DEMO, path)
    found = read(path)
    assert found.tokens == vocabulary.tokens
    np.testing.assert_array_equal(found.types, vocabulary.types)
    tokens = found.control.bos, found.control.eos, found.control.unk, found.control.pad
    assert [token and token.id for token in tokens] == [2, 1, 3, 0]
    merged = [i for i in range(SIZE) if found.types[i] == NORMAL and len(found.tokens[i]) > 1]
    order = np.argsort(-found.scores[merged], kind="stable")
    assert (np.diff(vocabulary.scores[merged][order]) <= 0).all()
    path.write_text("{")
    assert read_vocabulary([path, DEMO], SIZE) is not None  # SentencePiece's comes first
    assert read_vocabulary([], SIZE) is None


def test_rows_without_a_token_are_unused(vocabulary):
    padded = read(DEMO, SIZE + 2)
    assert padded.tokens == [*vocabulary.tokens, "[PAD8192]", "[PAD8193]"]
    assert padded.types[-2:].tolist() == [UNUSED, UNUSED]


def test_runs_match_in_raw_text_where_a_learned_piece_has_one(tmp_path):
    path = changed(tmp_path, lambda m: setattr(m.pieces[8000], "piece", "▁▁x"))
    found = read(path)
    assert found.tokens[139] == "  " and found.types[139] == USER_DEFINED


def test_normalization(tmp_path, capsys):
    def normalize(model: ModelProto) -> None:
        model.normalizer_spec.add_dummy_prefix = True
        model.normalizer_spec.name = "nmt_nfkc"
        model.normalizer_spec.remove_extra_whitespaces = True

    assert read(changed(tmp_path, normalize)).add_space_prefix
    assert "normalizes text (nmt_nfkc), which llama.cpp does not" in capsys.readouterr().err


REFUSED: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "unigram": (lambda m: setattr(m.trainer_spec, "model_type", 1), "not a BPE model"),
    "no bytes": (lambda m: setattr(m.trainer_spec, "byte_fallback", False), "not a BPE model"),
    "more tokens than rows": (lambda m: m.pieces.add(piece="8193rd"), "8193 tokens .* 8192 rows"),
    "twice": (lambda m: setattr(m.pieces[8000], "piece", "▁the"), "▁the is already defined"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    change, complaint = REFUSED[case]
    with pytest.raises(RequestError, match=complaint) as caught:
        read(changed(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b"[1]", b'{"model": {"vocab": 3}}'])
def test_unreadable(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError, match=name) as caught:
        read(path)
    assert "\n" not in str(caught.value)
