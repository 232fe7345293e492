"""The files beside the weights that say how text becomes tokens."""

from pathlib import Path

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""Either is enough."""
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def find_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Those that a folder has."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary, not only its settings."""
    return any((folder / name).is_file() for name in TOKENIZERS)
