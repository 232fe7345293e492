"""Reads a checkpoint's vocabulary in llama.cpp's form: pieces, scores and types by token id.

llama.cpp finds user-defined pieces in any text, but CONTROL tokens only if the caller asks for
them (`parse_special`). So turn tokens and other markup become CONTROL, while HTML tags and runs of
line breaks and tabs, which are text, stay user-defined.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.control_tokens import (
    ControlTokens,
    is_markup,
    json_tokens,
    sentencepiece_tokens,
)
from rgexport.griffin.tokenizer_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    guarded,
    is_gemmas_kind,
    normalization,
    read_pieces,
    read_tokenizer_json,
)
from rgexport.progress import warn

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_RUN = re.compile("▁▁+")
_PADDING_SCORE = -10_000.0


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]
    scores: np.ndarray
    types: np.ndarray
    control: ControlTokens
    add_space_prefix: bool


_Piece = tuple[str, float, int]
_Contents = tuple[list[_Piece], ControlTokens, bool]
"""Pieces, control tokens, and whether a space is put in front of a text."""


def read_vocabulary(files: Sequence[Path], vocab_size: int) -> Vocabulary | None:
    """Reads tokenizer.model, else tokenizer.json; None if there is neither."""
    paths = {path.name: path for path in files}
    name = next((name for name in _READERS if name in paths), None)
    if name is None:
        return None
    path = paths[name]
    with guarded(path):
        return _make(path, vocab_size, _READERS[name](path))


def _make(path: Path, vocab_size: int, contents: _Contents) -> Vocabulary:
    pieces, control, add_space_prefix = contents
    if len(pieces) > vocab_size:
        raise RequestError(
            f"{path} has {len(pieces)} tokens but the embedding {vocab_size} rows; "
            "put the tokenizer of this checkpoint beside it"
        )
    if not all(isinstance(text, str) for text, _, _ in pieces):  # protobuf lets bytes through
        raise RequestError(f"{path} has a token that is not UTF-8")
    padding = range(len(pieces), vocab_size)
    pieces = [*_stored(pieces), *((f"[PAD{index}]", _PADDING_SCORE, UNUSED) for index in padding)]
    tokens, scores, types = (list(column) for column in zip(*pieces, strict=True))
    if not np.isfinite(scores).all():
        raise RequestError(f"{path} has a token whose score is no number")
    if len(set(tokens)) != len(tokens):
        raise RequestError(f"{path} has the same token twice; llama.cpp cannot load that")
    numbers = np.array(scores, np.float32), np.array(types, np.int32)
    return Vocabulary(tokens, *numbers, control, add_space_prefix)


def _stored(pieces: list[_Piece]) -> Iterator[_Piece]:
    """Yields the pieces with which llama.cpp splits text as SentencePiece does.

    Runs of spaces become NORMAL with score 0, the highest, so the longest runs are found, whether
    spaces or "▁" were typed; user-defined, to match in raw text, if a learned piece has a run.
    """
    run_is_learned = any(kind == NORMAL and _RUN.search(text) for text, _, kind in pieces)
    for text, score, kind in pieces:
        if kind != USER_DEFINED:
            yield text, score, kind
        elif is_markup(text):
            yield text, score, CONTROL
        elif _RUN.fullmatch(text) and not run_is_learned:
            yield text, 0.0, NORMAL
        else:
            yield text.replace("▁", " "), score, USER_DEFINED


def _read_sentencepiece(path: Path) -> _Contents:
    import sentencepiece  # slow to load

    model = read_pieces(path)
    if not is_gemmas_kind(model):
        raise RequestError(
            f"{path} is not a BPE model with byte fallback, as Gemma's is; llama.cpp cannot do "
            "another kind: leave it out to export a model that takes token ids"
        )
    if rule := normalization(model):
        warn(f"{path} normalizes text ({rule}); llama.cpp does not and splits some texts otherwise")
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    engine = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return pieces, sentencepiece_tokens(engine), model.normalizer_spec.add_dummy_prefix


def _read_json(path: Path) -> _Contents:
    file = read_tokenizer_json(path)
    layout = file.fields
    model = layout["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        raise RequestError(
            f"{path} is a {model.get('type')} tokenizer without byte fallback; "
            "expected a conversion of Gemma's SentencePiece model; put tokenizer.model beside it"
        )
    known = file.engine().get_vocab(with_added_tokens=True)
    if sorted(known.values()) != list(range(len(known))):
        raise RequestError(
            f"{path} has gaps between its token ids, or one id twice; put tokenizer.model beside it"
        )
    added = layout.get("added_tokens", [])
    kinds = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    kinds |= {text: BYTE for text in known if _BYTE_PIECE.fullmatch(text)}
    kinds[model.get("unk_token")] = UNKNOWN
    scores = _merge_scores(model["merges"])
    lowest = -float(len(scores))
    pieces = [
        (text, 0.0, kinds[text]) if text in kinds else (text, scores.get(text, lowest), NORMAL)
        for text in sorted(known, key=lambda text: known[text])
    ]
    normalizer = layout.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    add_space_prefix = any(step.get("type") == "Prepend" for step in steps)
    return pieces, json_tokens(layout, known, path.parent), add_space_prefix


def _merge_scores(merges: list[str | list[str]]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        piece = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        scores.setdefault(piece, -float(rank))
    return scores


_READERS: dict[str, Callable[[Path], _Contents]] = {
    "tokenizer.model": _read_sentencepiece,
    "tokenizer.json": _read_json,
}
