"""Pieces of work, and the folder that keeps what they gave.

A piece says all that its result depends on. Whoever does it, and however often, the result is the
same; so a run that was cut off goes on with the pieces that are missing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.files.atomic import replace_file
from rgexport.files.regular_file import read_regular

Result = dict[str, Any]
"""What a piece gave, as JSON."""
_DIGITS = 20
_VERSION = 1
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
    """

    subject: str
    suite: str
    work: Mapping[str, Any]
    tokens: int

    @property
    def key(self) -> str:
        """A name that no piece with other work has."""
        text = json.dumps([_VERSION, self.subject, self.suite, self.work], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


class Results:
    """A folder with a file for each piece that is done."""

    def __init__(self, folder: Path):
        """`folder` is made if it is not there.

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

    def _file(self, piece: Piece) -> Path:
        return self._pieces / f"{piece.key}.json"


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
