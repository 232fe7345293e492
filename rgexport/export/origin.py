"""Who made a checkpoint and its licence, as far as its path, name and model card tell."""

import re
from dataclasses import dataclass
from pathlib import Path

from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.sizes import SIZES

_CARD_HEAD, _CARD_CHARACTERS = re.compile(r"---\n(.*?)\n---\n", re.DOTALL), 1 << 14
_HUB_CACHE = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_RELEASED = {size.hub_id for size in SIZES.values()}
_PREFIX = "recurrentgemma"
GEMMA = "gemma"
"""The hub's word for Gemma's terms."""
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"


@dataclass(frozen=True)
class Origin:
    """The hub's words, such as `google/recurrentgemma-2b` and `gemma`; None if unknown."""

    hub_id: str | None
    licence: str | None

    @property
    def released(self) -> bool:
        """Whether it is one of Google's released models."""
        return self.hub_id in _RELEASED


def origin_of(checkpoint: Checkpoint) -> Origin:
    """The origin of a checkpoint."""
    hub_id = _hub_id(checkpoint)
    if hub_id in _RELEASED:
        return Origin(hub_id, GEMMA)
    return Origin(hub_id, _licence(folder_of(checkpoint) / "README.md"))


def origin_of_card(path: Path) -> Origin:
    """What the YAML header of an artifact's card says."""
    head = _head(path)
    return Origin(_base_in(head), _licence_in(head))


def folder_of(checkpoint: Checkpoint) -> Path:
    """The folder that has a checkpoint's tokenizer and card."""
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


def _licence(card: Path) -> str | None:
    """The `license` in the YAML header of a model card."""
    return _licence_in(_head(card))


def _head(card: Path) -> str:
    """The YAML header of a model card, "" where there is none."""
    try:
        with card.open(encoding="utf-8", errors="replace") as file:
            head = _CARD_HEAD.match(file.read(_CARD_CHARACTERS))
    except OSError:
        return ""
    return head[1] if head else ""


def _licence_in(head: str) -> str | None:
    """The licence that a card names; Gemma's terms where it names Google's weights alone."""
    if match := re.search(r"^license: *([\w.-]+) *$", head, re.MULTILINE):
        return match[1]
    return GEMMA if _base_in(head) in _RELEASED else None


def _base_in(head: str) -> str | None:
    """The model that a card says its own is made from, in a line or as the first of a list."""
    match = re.search(r"^base_model: *(?:\n *- *)?([\w./-]+) *$", head, re.MULTILINE)
    return match[1] if match else None
