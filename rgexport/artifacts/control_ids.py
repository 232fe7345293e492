"""The control tokens that an artifact's files name for other programs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ControlIds:
    """The ids of control tokens, named as in a model's `config.json`.

    Attributes:
        bos_token_id: begins a text; None if there is no such token.
        eos_token_id: the tokens that end a reply: the end of a text, and the end of a turn if there
            is one.
        pad_token_id: fills up rows of a batch; None if there is no such token.
    """

    bos_token_id: int | None = 2
    eos_token_id: tuple[int, ...] = (1,)
    pad_token_id: int | None = 0

    def fields(self) -> dict[str, Any]:
        """Returns the fields of `config.json`, without tokens that do not exist."""
        return {name: ids for name, ids in vars(self).items() if ids not in (None, ())}
