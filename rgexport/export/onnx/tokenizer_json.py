"""Gemma's SentencePiece model as `tokenizer.json`, for onnxruntime-genai and transformers.js."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from rgexport.errors import RequestError
from rgexport.files.regular_file import read_regular
from rgexport.griffin.markup import is_markup

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Types of pieces in sentencepiece_model.proto."""
_BPE = 2
"""`TrainerSpec.ModelType` there."""
_MAX_BYTES = 256 << 20


def tokenizer_json(path: Path) -> str:
    """The text of `tokenizer.json` for a file `tokenizer.model`; it puts BOS before a text.

    SentencePiece merges the pair whose result has the highest score; here pairs are listed in that
    order. User-defined pieces, which it finds before it merges, are added tokens.

    Raises:
        RequestError: it is no BPE model with byte fallback, or cannot be read.
    """
    # slow to import, and generated without type information
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    try:
        model = ModelProto.FromString(read_regular(path, _MAX_BYTES))
        trainer, pieces = model.trainer_spec, model.pieces
        if trainer.model_type != _BPE or not trainer.byte_fallback:
            raise ValueError("it is no BPE model with byte fallback, as Gemma's is")
        ids = {piece.piece: index for index, piece in enumerate(pieces)}
        scores = {p.piece: p.score for p in pieces if p.type in (_NORMAL, _USER_DEFINED)}
        unknown = pieces[trainer.unk_id].piece
        engine = tokenizers.Tokenizer(
            models.BPE(
                vocab=ids,
                merges=_merges(scores, ids),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        engine.add_tokens([_added(p) for p in pieces if p.type not in (_NORMAL, _BYTE, _UNUSED)])
        bos = pieces[trainer.bos_id].piece if trainer.bos_id >= 0 else None
    except Exception as error:  # of protobuf and tokenizers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{path} cannot be converted to tokenizer.json ({reason}); copy it again from the "
            "original checkpoint, or put its tokenizer.json beside it"
        ) from None
    engine.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.decoder = decoders.Sequence(steps)
    if bos:
        engine.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, ids[bos])]
        )
    return engine.to_str()


def _merges(scores: Mapping[str, float], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, those of the highest score first."""

    def pairs() -> Iterator[tuple[float, int, str, str]]:
        for piece, score in scores.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in scores and right in scores:
                    yield -score, ids[piece], left, right

    return [(left, right) for _, _, left, right in sorted(pairs())]


def _added(piece: object) -> tokenizers.AddedToken:
    """Text pieces are found after spaces became "▁", markup as it stands."""
    text, kind = piece.piece, piece.type  # type: ignore[attr-defined]
    special = kind in (_UNKNOWN, _CONTROL) or is_markup(text)
    return tokenizers.AddedToken(text, special=special, normalized=not special)
