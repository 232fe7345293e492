"""Pieces of work, and the folder that keeps what they gave.

A piece says all that its result depends on. Whoever does it, and however often, the result is the
same; so a run that was cut off goes on with the pieces that are missing.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.atomic import replace_file
from rgexport.files.regular_file import read_regular
from rgexport.griffin.state import State

Result = dict[str, Any]
"""What a piece gave, as JSON."""
_DIGITS = 20
_VERSION = 2
"""Of what suites do: results of another version do not count."""
_MARK = "made by rgexport evaluate"


@dataclass(frozen=True)
class Piece:
    """A piece of a suite, for one model.

    Attributes:
        subject: the identity of the model.
        suite: its name.
        work: what is to be done, as JSON.
        tokens: that the model has to read, for estimates of time.
        after: the key of the piece whose state this one goes on from.
        leaves: whether its state is kept, for the piece after it.
    """

    subject: str
    suite: str
    work: Mapping[str, Any]
    tokens: int
    after: str | None = None
    leaves: bool = False

    @property
    def key(self) -> str:
        """A name that no piece with other work has."""
        text = json.dumps([_VERSION, self.subject, self.suite, self.work], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def chained(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, each of which goes on from the one before."""
    after: str | None = None
    for piece in pieces:
        yield replace(piece, after=after, leaves=piece is not pieces[-1])
        after = piece.key


class Results:
    """A folder with a file for each piece that is done."""

    def __init__(self, folder: Path):
        """`folder` is made if it is not there.

        The folder may be used by several processes at once.

        Raises:
            RequestError: it has anything but results.
        """
        self._pieces = folder / "pieces"
        mark = self._pieces / _MARK
        if folder.exists() and not mark.is_file() and not _is_empty(folder):
            raise RequestError(
                f"{folder} is no folder of results; expected one of an earlier run, an empty one, "
                "or none: pass another with -o"
            )
        self._pieces.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def get(self, piece: Piece) -> Result | None:
        """What a piece gave, or None where it is not done, or its file is damaged."""
        try:
            found = json.loads(read_regular(self._file(piece)))
        except (OSError, ValueError, RequestError):
            return None
        return found["result"] if isinstance(found, dict) and "result" in found else None

    def put(self, piece: Piece, result: Result) -> None:
        """Keeps what a piece gave; the file is there as a whole or not at all."""
        entry = {"suite": piece.suite, "work": dict(piece.work), "result": result}
        with replace_file(self._file(piece), force=True, replaceable=lambda path: True) as file:
            file.write_text(json.dumps(entry, indent=1) + "\n")

    def has_state(self, key: str) -> bool:
        """Whether the state that a piece left is there."""
        return self._state_file(key).is_file()

    def state(self, key: str) -> State:
        """The state that a piece left.

        Raises:
            RequestError: its file is damaged.
        """
        try:
            with np.load(self._state_file(key), allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, BadZipFile):
            raise RequestError(
                f"{self._state_file(key)} is damaged; remove it and run the command again"
            ) from None

    def keep_state(self, key: str, state: State) -> None:
        """Keeps the state that a piece left."""
        path = self._state_file(key)
        with (
            replace_file(path, force=True, replaceable=lambda path: True) as partial,
            partial.open("wb") as file,
        ):
            np.savez(file, **state)  # type: ignore[arg-type]  # `allow_pickle` is no state

    def drop_state(self, key: str) -> None:
        """Removes a state that nobody goes on from any more."""
        self._state_file(key).unlink(missing_ok=True)

    def _file(self, piece: Piece) -> Path:
        return self._pieces / f"{piece.key}.json"

    def _state_file(self, key: str) -> Path:
        return self._pieces / f"{key}.npz"


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
