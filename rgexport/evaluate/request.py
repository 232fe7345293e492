"""What a user asks `evaluate` for."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings of all suites.

    Attributes:
        texts: files and folders for `text`; none for the text that comes with rgexport.
        limit: most tokens of a document, or None.
        context: tokens of a chunk.
        trials: of each task and distance in `memory`.
        farthest: the largest distance of `memory`, in tokens.
        seed: of all that is drawn.
    """

    texts: tuple[Path, ...] = ()
    limit: int | None = None
    context: int = 512
    trials: int = 32
    farthest: int | None = None
    seed: int = 0
