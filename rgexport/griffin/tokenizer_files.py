"""The tokenizer's files in a model folder, and the content of a `tokenizer.model`."""

from pathlib import Path
from typing import Any

from rgexport.files.paths import read_regular

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""The vocabulary; one of them is enough."""
TOKENIZER_CONFIG = "tokenizer_config.json"
"""Settings, such as the names of control tokens and the chat template."""
TOKENIZER_FILES = (
    *TOKENIZERS,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces (sentencepiece_model.proto), with the same numbers in llama.cpp."""
BPE = 2
"""`TrainerSpec.ModelType`."""
MAX_BYTES = 256 << 20
"""Largest file of a vocabulary: Gemma's has 4 MB, or 33 MB as JSON."""


def find_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has a vocabulary, not only its settings."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def read_pieces(path: Path) -> Any:
    """Returns the `ModelProto` of a file; any error of protobuf may be raised."""
    # slow to import, and generated without type information
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto.FromString(read_regular(path, MAX_BYTES))


def is_gemmas_kind(model: Any) -> bool:
    """Returns whether it is a BPE model with byte fallback that writes spaces as "▁"."""
    trainer = model.trainer_spec
    is_bpe = trainer.model_type == BPE and trainer.byte_fallback
    return bool(is_bpe and model.normalizer_spec.escape_whitespaces)


def normalization(model: Any) -> str | None:
    """Returns the name of the rule by which a model changes text before it splits it."""
    spec = model.normalizer_spec
    if not (spec.precompiled_charsmap or spec.remove_extra_whitespaces):
        return None
    return spec.name or "whitespace"
