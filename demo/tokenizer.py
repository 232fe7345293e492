"""Trains a small SentencePiece model with Gemma's id layout.

The trainer decides itself where byte pieces go, so the pieces are put in order afterwards:
control pieces, `<unusedN>`, the turn pieces, whitespace runs and HTML tags where Gemma has them,
bytes at 217-472, then the learned pieces.
"""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2

PAD, EOS, BOS, UNK, START_OF_TURN, END_OF_TURN = 0, 1, 2, 3, 106, 107
FIRST_BYTE, FIRST_LEARNED = 217, 473
HTML = (
    *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td"),
    *("/table", "/caption", "/thead", "/tbody", "/tfoot", "/tr", "/th", "/td"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "blockquote"),
    *("/h1", "/h2", "/h3", "/h4", "/h5", "/h6", "/blockquote"),
    *("strong", "em", "b", "i", "u", "s", "sub", "sup", "code"),
    *("/strong", "/em", "/b", "/i", "/u", "/s", "/sub", "/sup", "/code"),
)
USER_DEFINED = (
    *("<mask>", "<2mass>", "[@BOS@]"),
    *(f"<unused{i}>" for i in range(99)),
    *("<start_of_turn>", "<end_of_turn>"),
    *("\n" * n for n in range(1, 32)),
    *("▁" * n for n in range(2, 32)),
    *(f"<{tag}>" for tag in HTML),
)


def train(sentences: Iterable[str], vocab_size: int, path: Path) -> None:
    """Writes the trained model to `path`."""
    raw = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=raw,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=list(USER_DEFINED),
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.9999,
        max_sentence_length=1 << 16,
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNK,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    model = model_pb2.ModelProto.FromString(raw.getvalue())
    reorder(model)
    path.write_bytes(model.SerializeToString())


def reorder(model: model_pb2.ModelProto) -> None:
    """Sorts the pieces into Gemma's layout; learned pieces keep their merge order."""
    kind = model_pb2.ModelProto.SentencePiece
    defined = {piece: i for i, piece in enumerate(USER_DEFINED)}
    fixed = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": UNK}

    def place(piece: model_pb2.ModelProto.SentencePiece) -> int:
        if piece.type == kind.BYTE:
            return FIRST_BYTE + int(piece.piece[1:-1], 16)
        if piece.type == kind.USER_DEFINED:
            return 4 + defined[piece.piece]
        return fixed.get(piece.piece, FIRST_LEARNED)

    pieces = sorted(model.pieces, key=place)  # stable
    del model.pieces[:]
    model.pieces.extend(pieces)


def check(path: Path) -> None:
    """Raises unless the ids are Gemma's and text survives encoding and decoding."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    expected = {
        "<pad>": PAD,
        "<eos>": EOS,
        "<bos>": BOS,
        "<unk>": UNK,
        "<mask>": 4,
        "<unused0>": 7,
        "<start_of_turn>": START_OF_TURN,
        "<end_of_turn>": END_OF_TURN,
        "\n": 108,
        "▁▁": 139,
        "<table>": 169,
        "</code>": 216,
        "<0x00>": FIRST_BYTE,
        "<0xFF>": FIRST_LEARNED - 1,
    }
    for piece, want in expected.items():
        found = processor.PieceToId(piece)
        if found != want:
            raise ValueError(f"piece {piece!r}: expected id {want}, found {found}")
    for text in (
        "Hello!",
        "  two  spaces\n\n\n\ttab ",
        "naïve — 東京 🐢\x00\x7f",
        " 12345 <b>x</b>",
    ):
        back = processor.Decode(processor.Encode(text))
        if back != text:
            raise ValueError(f"expected {text!r} back from the tokenizer, found {back!r}")
    turn = processor.Encode("<start_of_turn>user\nHi<end_of_turn>\n")
    if (turn[0], turn[2], turn[-2], turn[-1]) != (START_OF_TURN, 108, END_OF_TURN, 108):
        raise ValueError(f"expected whole turn pieces, found {turn}")
