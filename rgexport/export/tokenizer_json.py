"""Writes a SentencePiece model as `tokenizer.json`, which other programs read.

A vocabulary has 256,000 pieces and half a million merges. They are written one by one: the library
that reads them would take 250 MB for them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from rgexport.errors import RequestError
from rgexport.griffin.control_tokens import ControlTokens, is_markup, sentencepiece_tokens
from rgexport.griffin.tokenizer_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_gemmas_kind,
    read_pieces,
)


def write_tokenizer_json(source: Path, target: Path) -> None:
    """Converts a `tokenizer.model` to a `tokenizer.json`, which puts BOS before a text.

    SentencePiece merges the pair whose result has the highest score; here pairs are listed in that
    order. User-defined pieces, which it finds before it merges, are added tokens.

    Raises:
        RequestError: it is no BPE model with byte fallback, or cannot be read.
    """
    try:
        model = read_pieces(source)
        if not is_gemmas_kind(model):
            raise ValueError("it is no BPE model with byte fallback, as Gemma's is")
        engine = sentencepiece.SentencePieceProcessor(model_file=str(source))
        frame = _frame(model, sentencepiece_tokens(engine))
        pieces = [piece.piece for piece in model.pieces]
        merged = (NORMAL, USER_DEFINED)
        scores = {i: p.score for i, p in enumerate(model.pieces) if p.type in merged}
    except Exception as error:  # of protobuf and tokenizers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{source} cannot be converted to tokenizer.json ({reason}); copy it again from the "
            "original checkpoint, or put its tokenizer.json beside it"
        ) from None
    del model, engine
    with target.open("w", encoding="utf-8") as file:
        file.writelines(_filled(frame, _vocabulary(pieces), _merges(pieces, scores)))


def _frame(model: Any, tokens: ControlTokens) -> dict[str, Any]:
    """Returns all of the file but the vocabulary and the merges."""
    added = {i: p for i, p in enumerate(model.pieces) if p.type not in (NORMAL, BYTE, UNUSED)}
    engine = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in added.items()},
            merges=[],
            unk_token=tokens.unk and tokens.unk.piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    engine.add_tokens([_added(piece) for piece in added.values()])
    engine.normalizer = _normalizer(model.normalizer_spec)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.decoder = decoders.Sequence(steps)
    if tokens.bos is not None:
        bos = tokens.bos.piece
        engine.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, tokens.bos.id)],
        )
    frame: dict[str, Any] = json.loads(engine.to_str())
    return frame


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """Changes text as SentencePiece does before it splits it."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    spaces = normalizers.Replace(" ", "▁")
    return normalizers.Sequence([*steps, spaces]) if steps else spaces


def _added(piece: Any) -> tokenizers.AddedToken:
    """Text pieces are found after spaces became "▁", markup as it stands."""
    special = piece.type in (UNKNOWN, CONTROL) or is_markup(piece.piece)
    return tokenizers.AddedToken(piece.piece, special=special, normalized=not special)


def _vocabulary(pieces: Sequence[str]) -> Iterator[str]:
    for i, piece in enumerate(pieces):
        yield f"{json.dumps(piece)}:{i}"


def _merges(pieces: Sequence[str], scores: Mapping[int, float]) -> Iterator[str]:
    """Every pair of pieces that makes a piece, those of the highest score first."""
    known = {pieces[i] for i in scores}
    pairs = (
        (-score, i, cut)
        for i, score in scores.items()
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in known and pieces[i][cut:] in known
    )
    found = np.fromiter(pairs, [("order", "f4"), ("id", "i4"), ("cut", "i4")])
    for _, i, cut in np.sort(found):
        yield json.dumps([pieces[i][:cut], pieces[i][cut:]])


def _filled(
    frame: dict[str, Any], vocabulary: Iterator[str], merges: Iterator[str]
) -> Iterator[str]:
    """The text of the file, in pieces."""
    parts = {"vocab": ("{", vocabulary, "}"), "merges": ("[", merges, "]")}
    model = frame.pop("model")
    yield json.dumps(frame)[:-1] + ', "model": {'
    rest = {name: value for name, value in model.items() if name not in parts}
    yield json.dumps(rest)[1:-1]
    for name, (start, items, end) in parts.items():
        yield f', "{name}": {start}'
        for i, item in enumerate(items):
            yield f",\n{item}" if i else item
        yield end
    yield "}}\n"
