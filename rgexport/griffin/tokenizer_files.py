"""The files beside the weights that say how text becomes tokens."""

from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def find_tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Those that a folder has."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
