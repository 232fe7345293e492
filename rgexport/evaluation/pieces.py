"""The request of an evaluation, the pieces that it is cut into, and the folder of their results.

A piece names everything its result depends on, so any process may measure it at any time. A run
that was interrupted measures only the pieces whose results are missing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock

from rgexport.errors import RequestError
from rgexport.files.atomic import replacing
from rgexport.files.paths import report_os_errors
from rgexport.files.targets import require_free_disk
from rgexport.files.typed_json import read_json
from rgexport.griffin.state import State

Result = dict[str, Any]
"""The result of a piece, a suite or a model as JSON."""
Settings = Mapping[str, Any]
"""The settings of a piece as JSON."""
Measured = Sequence[tuple[Settings, Result]]
"""The settings and results of the pieces of one suite and model, in their order."""
_FARTHEST_WINDOWS = 4
"""The farthest distance of `memory` in windows, unless the request names one."""
_LEAST_WINDOW = 16
"""Tokens that a smaller window counts as, so that models without attention are tested, too."""
_DIGITS = 20
"""Hexadecimal digits of a piece's key."""
_VERSION = 5
"""Increased when a suite measures something else; results of other versions are not used."""
_MARK = "made by rgexport evaluate"


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """The settings of all suites.

    Attributes:
        folder: folder of the results; `length` writes state files into it, too.
        texts: files and folders; empty for the text that comes with rgexport.
        limit: most tokens of a document in `text`.
        context, stride: tokens of a chunk, and between the beginnings of overlapping chunks.
        trials: episodes of each task and distance in `memory`.
        farthest: the largest distance of `memory`, in tokens; None for four windows.
        length: tokens of `length`, which continues from the state file `state`.
        tasks: names of tasks of lm_eval, or of the folder `task_files`.
        examples: most examples of a task.
    """

    folder: Path = Path("evaluation")
    texts: tuple[Path, ...] = ()
    limit: int | None = None
    context: int = 512
    stride: int | None = None
    trials: int = 32
    farthest: int | None = None
    length: int = 1 << 15
    state: Path | None = None
    tasks: tuple[str, ...] = ()
    task_files: Path | None = None
    examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride >= self.context:
            raise RequestError(
                f"--stride is {self.stride}, --context {self.context}; expected a smaller stride"
            )

    def for_window(self, window: int) -> "EvaluationRequest":
        """Returns the request with `farthest` set, by default to some windows of the models."""
        if self.farthest is not None:
            return self
        return replace(self, farthest=_FARTHEST_WINDOWS * max(window, _LEAST_WINDOW))

    def resolved(self) -> "EvaluationRequest":
        """Returns the request with absolute paths, for processes in other folders."""
        return replace(
            self,
            folder=self.folder.absolute(),
            texts=tuple(path.absolute() for path in self.texts),
            state=self.state and self.state.absolute(),
            task_files=self.task_files and self.task_files.absolute(),
        )


@dataclass(frozen=True)
class Piece:
    """A part of a suite that is measured for one model.

    Attributes:
        model: identity of the model.
        settings: everything else that the result depends on.
        tokens: estimate of the time, for progress bars.
    """

    model: str
    suite: str
    settings: Settings
    tokens: int

    @property
    def key(self) -> str:
        """A hash of all that the result depends on, which names the files of the piece."""
        text = json.dumps([_VERSION, self.model, self.suite, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


Chain = Sequence[Piece]
"""Pieces that one process measures one after another; each begins with the state of the last."""


class Results:
    """A folder with a file for each measured piece.

    Several processes may use one folder at once, if each holds the `lock` of the chain that it
    measures.
    """

    def __init__(self, folder: Path):
        """Creates the folder, or opens an earlier one.

        Raises:
            RequestError: the folder has files that `evaluate` did not write.
        """
        self._pieces = folder / "pieces"
        mark = self._pieces / _MARK
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if folder.exists() and not mark.is_file() and not is_empty:
            raise RequestError(
                f"{folder} is no folder of results; expected one of an earlier run, an empty one, "
                "or none: pass another with -o"
            )
        require_free_disk(folder, 1 << 20)
        with report_os_errors(folder, "write"):
            self._pieces.mkdir(parents=True, exist_ok=True)
            mark.touch()

    def get(self, piece: Piece) -> Result | None:
        """Returns the result of a piece, or None if its file is missing or damaged."""
        try:
            return read_json(self._result_file(piece)).get("result")
        except RequestError:
            return None

    def put(self, piece: Piece, result: Result) -> None:
        """Writes the result of a piece."""
        entry = {"suite": piece.suite, "work": dict(piece.settings), "result": result}
        text = json.dumps(entry, indent=1, allow_nan=False) + "\n"
        _write(self._result_file(piece), lambda file: file.write(text.encode()))

    def state(self, piece: Piece) -> State:
        """Returns the state after a piece.

        Raises:
            RequestError: the file of the state is missing or damaged.
        """
        path = self._state_file(piece)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, BadZipFile):
            raise RequestError(
                f"{path} is gone or damaged; remove it and run the command again"
            ) from None

    def keep_state(self, piece: Piece, state: State) -> None:
        """Writes the state after a piece, from which the next one of its chain continues."""
        # The names of the arrays are keyword arguments; none is called `allow_pickle`.
        _write(self._state_file(piece), lambda file: np.savez(file, **state))  # type: ignore[arg-type]

    def drop_state(self, piece: Piece) -> None:
        """Removes the state after a piece, if there is one."""
        self._state_file(piece).unlink(missing_ok=True)

    def lock(self, chain: Chain) -> AbstractContextManager[Any]:
        """Lets one process at a time measure a chain that passes states on: it drops old ones."""
        if len(chain) < 2:
            return nullcontext()
        return FileLock(self._pieces / f"{chain[-1].key}.lock")

    def missing(self, chain: Chain) -> list[int]:
        """Returns the indices of pieces that lack a result, or a state that the next one needs."""
        indices: list[int] = []
        for index in reversed(range(len(chain))):
            piece = chain[index]
            next_is_missing = index + 1 in indices
            lacks_state = next_is_missing and not self._state_file(piece).is_file()
            if lacks_state or self.get(piece) is None:
                indices.append(index)
        return indices[::-1]

    def _result_file(self, piece: Piece) -> Path:
        return self._pieces / f"{piece.key}.json"

    def _state_file(self, piece: Piece) -> Path:
        return self._pieces / f"{piece.key}.npz"


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file under a temporary name and renames it, so that no reader sees half of it."""
    with report_os_errors(path, "write"), replacing(path) as partial, partial.open("wb") as file:
        write(file)
