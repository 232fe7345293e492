"""What is in a `tokenizer.model`, as sentencepiece_model.proto declares it."""

from pathlib import Path
from typing import Any

from rgexport.files.paths import read_regular

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, with the same numbers in llama.cpp."""
BPE = 2
"""`TrainerSpec.ModelType`."""
MAX_BYTES = 256 << 20
"""Largest file of a vocabulary: Gemma's has 4 MB, or 33 MB as JSON."""


def read_pieces(path: Path) -> Any:
    """The `ModelProto` of a file.

    Raises:
        Exception: whatever protobuf has against it.
    """
    # slow to import, and generated without type information
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto.FromString(read_regular(path, MAX_BYTES))


def is_gemmas_kind(model: Any) -> bool:
    """Returns whether it is a BPE model with byte fallback whose spaces are "▁"."""
    trainer = model.trainer_spec
    is_bpe = trainer.model_type == BPE and trainer.byte_fallback
    return bool(is_bpe and model.normalizer_spec.escape_whitespaces)


def normalization(model: Any) -> str | None:
    """Returns the name of the rule by which a model changes text before it splits it."""
    spec = model.normalizer_spec
    if not (spec.precompiled_charsmap or spec.remove_extra_whitespaces):
        return None
    return spec.name or "whitespace"
