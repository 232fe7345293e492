"""Finds out who made a checkpoint, and its licence, from its path, name and model card."""

import re
from dataclasses import dataclass
from pathlib import Path

from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.config import SIZES

_CARD_HEAD, _CARD_CHARACTERS = re.compile(r"---\n(.*?)\n---\n", re.DOTALL), 1 << 14
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_RELEASED = {size.hub_id for size in SIZES.values()}
_PREFIX = "recurrentgemma"
GEMMA = "gemma"
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"


@dataclass(frozen=True)
class Origin:
    hub_id: str | None  # such as `google/recurrentgemma-2b`
    licence: str | None  # the hub's name of it, such as `gemma`

    @property
    def released(self) -> bool:
        return self.hub_id in _RELEASED


def origin_of(checkpoint: Checkpoint) -> Origin:
    hub_id = _hub_id(checkpoint)
    if hub_id in _RELEASED:
        return Origin(hub_id, GEMMA)
    return Origin(hub_id, origin_of_card(folder_of(checkpoint) / "README.md").licence)


def origin_of_card(path: Path) -> Origin:
    """Reads base model and licence in a card's header; Gemma's for a base by Google."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            match = _CARD_HEAD.match(file.read(_CARD_CHARACTERS))
    except OSError:
        match = None
    head = match[1] if match else ""
    base = re.search(r"^base_model: *(?:\n *- *)?([\w./-]+) *$", head, re.MULTILINE)
    licence = re.search(r"^license: *([\w.-]+) *$", head, re.MULTILINE)
    gemma = GEMMA if base and base[1] in _RELEASED else None
    return Origin(base[1] if base else None, licence[1] if licence else gemma)


def folder_of(checkpoint: Checkpoint) -> Path:
    if checkpoint.tokenizer_files:
        return checkpoint.tokenizer_files[0].parent
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _hub_id(checkpoint: Checkpoint) -> str | None:
    for part in reversed(checkpoint.path.parts):
        if match := _HUB_CACHE.fullmatch(part):
            return f"{match['owner']}/{match['name']}"
    # A copy of a folder of the hub keeps its name; DeepMind's own files are called 2b-it.pt.
    prefix = "" if checkpoint.name.startswith(_PREFIX) else f"{_PREFIX}-"
    name = prefix * (checkpoint.layout == "deepmind") + checkpoint.name
    return next((hub_id for hub_id in _RELEASED if hub_id.endswith(f"/{name}")), None)
