"""Pieces of work, and the folder that keeps what they gave.

A piece says all that its result depends on. Whoever does it, and however often, the result is the
same; so a run that was cut off goes on with the pieces that are missing.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock

from rgexport.errors import RequestError
from rgexport.files.atomic import replacing
from rgexport.files.typed_json import read_json
from rgexport.griffin.state import State

Result = dict[str, Any]
"""What a piece gave, as JSON."""
_DIGITS = 20
_VERSION = 4
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
    """

    subject: str
    suite: str
    work: Mapping[str, Any]
    tokens: int
    after: str | None = None

    @property
    def key(self) -> str:
        """A name that no piece with other work has."""
        text = json.dumps([_VERSION, self.subject, self.suite, self.work], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


Chain = Sequence[Piece]
"""Pieces that go on from one another: one process does them, one after another."""


def chained(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, each of which goes on from the one before."""
    after: str | None = None
    for piece in pieces:
        yield replace(piece, after=after)
        after = piece.key


class Results:
    """A folder with a file for each piece that is done."""

    def __init__(self, folder: Path):
        """`folder` is made if it is not there; several processes may use it at once.

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
            return read_json(self._file(piece)).get("result")
        except RequestError:
            return None

    def put(self, piece: Piece, result: Result) -> None:
        """Keeps what a piece gave; the file is there as a whole or not at all."""
        entry = {"suite": piece.suite, "work": dict(piece.work), "result": result}
        data = (json.dumps(entry, indent=1) + "\n").encode()
        _write(self._file(piece), lambda file: file.write(data))

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
                f"{self._state_file(key)} is gone or damaged; remove it and run the command again"
            ) from None

    def keep_state(self, key: str, state: State) -> None:
        """Keeps the state that a piece left."""
        # `allow_pickle` is no name of a state.
        _write(self._state_file(key), lambda file: np.savez(file, **state))  # type: ignore[arg-type]

    def drop_state(self, key: str) -> None:
        """Removes a state that nobody goes on from any more."""
        self._state_file(key).unlink(missing_ok=True)

    def alone(self, chain: Chain) -> AbstractContextManager[Any]:
        """While one process is at a chain, others wait: each would drop the states of the other.

        A piece without a state may be done twice: what it gives is the same.
        """
        states = any(piece.after for piece in chain)
        return FileLock(self._pieces / f"{chain[-1].key}.lock") if states else nullcontext()

    def _file(self, piece: Piece) -> Path:
        return self._pieces / f"{piece.key}.json"

    def _state_file(self, key: str) -> Path:
        return self._pieces / f"{key}.npz"


def unfinished(chain: Chain, results: Results) -> list[Piece]:
    """The pieces of a chain that have to be done, also again for the sake of a state that is lost.

    A piece that is to be done needs the state of the one before it.
    """
    found: list[Piece] = []
    for piece in reversed(chain):
        needed = bool(found) and found[-1].after == piece.key
        if results.get(piece) is None or (needed and not results.has_state(piece.key)):
            found.append(piece)
    return found[::-1]


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file in one step; several processes may do so at once."""
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            write(file)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from None


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
