"""The pieces that a run is cut into, and the folder that keeps their results.

A piece names everything its result depends on, so any process may measure it at any time. A run
that was interrupted measures only the pieces whose results are missing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""The result of a piece, a suite or a model as JSON."""
Settings = Mapping[str, Any]
"""The settings of a piece as JSON."""
Measured = Sequence[tuple[Settings, Result]]
"""The settings and results of the pieces of one suite and model, in their order."""
_DIGITS = 20
_VERSION = 5
"""Increased when a suite measures something else; results of other versions are not used."""
_MARK = "made by rgexport evaluate"


@dataclass(frozen=True)
class Piece:
    """A part of a suite that is measured for one model.

    Attributes:
        model: the identity of the model.
        suite: its name.
        settings: of the measurement.
        tokens: that the model has to read, for estimates of time.
        after: the key of the piece whose final state is this one's initial state, or None.
    """

    model: str
    suite: str
    settings: Settings
    tokens: int
    after: str | None = None

    @property
    def key(self) -> str:
        """A hash of the model, the suite and the settings."""
        text = json.dumps([_VERSION, self.model, self.suite, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


Chain = Sequence[Piece]
"""Pieces that pass their states on; one process measures them one after another."""


def chained(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields the pieces; each one begins with the state of the one before."""
    after: str | None = None
    for piece in pieces:
        yield replace(piece, after=after)
        after = piece.key


def chains_of(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Groups neighbouring pieces that pass their states on."""
    chains: list[list[Piece]] = []
    for piece in pieces:
        if piece.after and chains and chains[-1][-1].key == piece.after:
            chains[-1].append(piece)
        else:
            chains.append([piece])
    return chains


class Results:
    """A folder with a file for each measured piece."""

    def __init__(self, folder: Path):
        """Creates the folder if it is missing; several processes may use it at once.

        Raises:
            RequestError: the folder has other files.
        """
        self._pieces = folder / "pieces"
        mark = self._pieces / _MARK
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if folder.exists() and not mark.is_file() and not is_empty:
            raise RequestError(
                f"{folder} is no folder of results; expected one of an earlier run, an empty one, "
                "or none: pass another with -o"
            )
        self._pieces.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def get(self, piece: Piece) -> Result | None:
        """Returns the result of a piece, or None if its file is missing or damaged."""
        try:
            return read_json(self._result_file(piece)).get("result")
        except RequestError:
            return None

    def put(self, piece: Piece, result: Result) -> None:
        """Writes the result of a piece atomically."""
        entry = {"suite": piece.suite, "work": dict(piece.settings), "result": result}
        data = (json.dumps(entry, indent=1, allow_nan=False) + "\n").encode()
        _write(self._result_file(piece), lambda file: file.write(data))

    def has_state(self, key: str) -> bool:
        """Whether the final state of a piece is stored."""
        return self._state_file(key).is_file()

    def state(self, key: str) -> State:
        """Returns the final state of a piece.

        Raises:
            RequestError: its file is missing or damaged.
        """
        try:
            with np.load(self._state_file(key), allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, BadZipFile):
            raise RequestError(
                f"{self._state_file(key)} is gone or damaged; remove it and run the command again"
            ) from None

    def keep_state(self, key: str, state: State) -> None:
        """Writes the final state of a piece atomically."""
        # `allow_pickle` is no name of a state.
        _write(self._state_file(key), lambda file: np.savez(file, **state))  # type: ignore[arg-type]

    def drop_state(self, key: str) -> None:
        """Removes a state that no piece needs any more."""
        self._state_file(key).unlink(missing_ok=True)

    def lock(self, chain: Chain) -> AbstractContextManager[Any]:
        """Lets one process at a time measure a chain, so that none drops another one's states.

        Pieces without a state need no lock: two processes write the same result.
        """
        if any(piece.after for piece in chain):
            return FileLock(self._pieces / f"{chain[-1].key}.lock")
        return nullcontext()

    def missing(self, chain: Chain) -> list[Piece]:
        """Returns the pieces of a chain to be measured.

        A piece with a result is measured again if the next one needs its state, and that is gone.
        """
        pieces: list[Piece] = []
        for piece in reversed(chain):
            needed = bool(pieces) and pieces[-1].after == piece.key
            if self.get(piece) is None or (needed and not self.has_state(piece.key)):
                pieces.append(piece)
        return pieces[::-1]

    def _result_file(self, piece: Piece) -> Path:
        return self._pieces / f"{piece.key}.json"

    def _state_file(self, key: str) -> Path:
        return self._pieces / f"{key}.npz"


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file in one step; several processes may do so at once."""
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            write(file)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from None
