"""The conversion of a SentencePiece model against SentencePiece."""

from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rgexport.errors import RequestError
from rgexport.export.tokenizer_json import write_tokenizer_json

MODEL = Path(__file__).parents[2] / "demo" / "model" / "tokenizer.model"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> tokenizers.Tokenizer:
    made = tmp_path_factory.mktemp("made") / "tokenizer.json"
    write_tokenizer_json(MODEL, made)
    return tokenizers.Tokenizer.from_file(str(made))


@pytest.fixture(scope="module")
def oracle() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


PARTS = st.sampled_from(
    [
        "a",
        "the ",
        " ",
        "  ",
        "\n",
        "\t",
        "▁",
        "é",
        "🙂",
        "漢",
        "\u200b",
        "<",
        "<b>",
        "<table>",
        "<mask>",
        "<start_of_turn>",
        "<unused1>",
        "0",
        "…",
        " token",
        "izer",
        "\x00",
    ]
)


@given(st.lists(PARTS, max_size=60).map("".join) | st.text(max_size=200))
def test_it_encodes_as_sentencepiece(engine, oracle, text: str) -> None:
    assert engine.encode(text, add_special_tokens=False).ids == oracle.EncodeAsIds(text)


def test_it_encodes_long_text(engine, oracle) -> None:
    text = "\n".join(path.read_text("utf-8") for path in MODEL.parents[2].glob("*.md"))
    assert engine.encode(text, add_special_tokens=False).ids == oracle.EncodeAsIds(text)
    runs = " " * 100 + "\n" * 100 + "a" * 100
    assert engine.encode(runs, add_special_tokens=False).ids == oracle.EncodeAsIds(runs)


def test_ids_markup_and_the_beginning(engine, oracle) -> None:
    assert engine.get_vocab_size() == oracle.GetPieceSize()
    assert all(engine.id_to_token(i) == oracle.IdToPiece(i) for i in range(8192))
    ids = engine.encode("Hi<end_of_turn>").ids
    assert ids[0] == oracle.bos_id() and ids[-1] == oracle.PieceToId("<end_of_turn>")
    assert engine.decode(ids) == "Hi"
    assert engine.decode(engine.encode("caf\u00e9  \U0001f642").ids) == "caf\u00e9  \U0001f642"


def test_other_models_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g\n" * 100)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "m"), vocab_size=12, model_type="unigram"
    )
    with pytest.raises(RequestError, match=r"cannot be converted to tokenizer.json .it is no BPE"):
        write_tokenizer_json(tmp_path / "m.model", tmp_path / "made")
    (tmp_path / "m.model").write_bytes(b"\xff\xff")
    with pytest.raises(RequestError, match="copy it again from the original checkpoint"):
        write_tokenizer_json(tmp_path / "m.model", tmp_path / "made")
    assert not (tmp_path / "made").exists()
