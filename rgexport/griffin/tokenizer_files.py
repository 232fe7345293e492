"""The tokenizer's files in a model folder."""

from pathlib import Path

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


def find_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files that are in a folder."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a vocabulary, not only its settings."""
    return any((folder / name).is_file() for name in TOKENIZERS)
