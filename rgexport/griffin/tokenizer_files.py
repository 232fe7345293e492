"""The tokenizer's files in a model folder."""

import json
from pathlib import Path
from typing import Any

from rgexport.files.regular_file import read_regular

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""The vocabulary; one of them is enough."""
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
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


def control_token_names(folder: Path) -> dict[str, str]:
    """The control tokens by tokenizer_config.json, or Gemma's where it names none.

    The keys are `bos_token`, `eos_token` and `pad_token`.
    """
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(read_regular(path)) if path.is_file() else {}
    for key, name in names.items():
        value = config.get(key) or name
        names[key] = value["content"] if isinstance(value, dict) else value
    return names
