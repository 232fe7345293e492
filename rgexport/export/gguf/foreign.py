"""GGUF files that rgexport did not make: of other models, or converted by other tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.files.hashing import FileRecord, hash_new_files
from rgexport.quantize.gguf_header import is_gguf, read_values

OURS = "rgexport."
"""What several keys of each file that we made begin with: damage to one of them hides no file."""


@dataclass(frozen=True)
class ForeignGguf:
    """Such a file; of its header, only the metadata were read."""

    path: Path
    values: dict[str, Any]

    @property
    def window(self) -> int | None:
        """Tokens before its own that a layer with a sliding window sees; None without such."""
        architecture = self.values.get("general.architecture")
        found = self.values.get(f"{architecture}.attention.sliding_window")
        return found - 1 if isinstance(found, int) and found > 1 else None

    def record(self) -> FileRecord:
        """Its size and its hash, which is computed where the file was not seen in this state."""
        return FileRecord(hash_new_files([self.path])[self.path], self.path.stat().st_size)


def find_foreign(path: Path) -> ForeignGguf | None:
    """The file at a path, if it is a whole one whose metadata can be read and has none of our keys.

    Of any other GGUF file, `open_artifact` says what is wrong with it.
    """
    if not is_gguf(path):
        return None
    try:
        values = read_values(path)
    except RequestError:
        return None
    parts = values.get("split.count", 0)
    whole = isinstance(parts, int) and parts <= 1
    return ForeignGguf(path, values) if whole and not any(map(_is_ours, values)) else None


def _is_ours(key: str) -> bool:
    return key.startswith(OURS)
