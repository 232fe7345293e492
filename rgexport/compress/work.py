"""The folder of an unfinished calibration: what later steps need, and the file so far.

An array is complete when it is there: it is written under another name and then renamed. The
residual stream after a layer is written last, so it says that the layer is done.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.atomic import remove_partials, replacing
from rgexport.files.safetensors import header
from rgexport.files.targets import COMPLETE
from rgexport.files.typed_json import read_json
from rgexport.quantize.calibration_format import Arrays, Provenance

_REQUEST = "request.json"


class Work:
    """Arrays by name, and by the number of the step that made them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, name: str, array: np.ndarray) -> None:
        """Writes an array, which appears when it is complete and on the disk."""
        path = self._path(name)
        remove_partials(path)
        with replacing(path, durable=True) as partial, partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    def load(self, name: str) -> np.ndarray | None:
        """An array, None if it is not there.

        Raises:
            RequestError: it cannot be read.
        """
        try:
            found: np.ndarray = np.load(self._path(name), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError):
            raise RequestError(
                f"{self._path(name)} is damaged; remove {self.folder} and run the command again"
            ) from None
        return found

    def drop(self, name: str) -> None:
        """Removes an array, if it is there."""
        self._path(name).unlink(missing_ok=True)

    def steps(self, name: str) -> list[int]:
        """The steps K for which there is an array `NAME-K`, in ascending order."""
        pattern = re.compile(rf"{re.escape(name)}-(\d+)\.npy")
        found = (pattern.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def open_work(folder: Path, request: Mapping[str, Any], *, force: bool) -> Work:
    """Opens the folder, with what an earlier run of the same request has left in it.

    Raises:
        RequestError: it has something else in it, or another request's work and not `force`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _require_same(folder, request, force)
    if not (folder / _REQUEST).exists():
        folder.mkdir(exist_ok=True)
        text = json.dumps(request, indent=2, sort_keys=True) + "\n"
        (folder / _REQUEST).write_text(text, "utf-8")
    return Work(folder)


def _require_same(folder: Path, request: Mapping[str, Any], force: bool) -> None:
    """Removes another request's work if it may; leaves that of the same request."""
    if not (folder / _REQUEST).is_file():
        raise RequestError(
            f"{folder} exists and is no unfinished calibration; remove it, or pass another -o"
        )
    found = read_json(folder / _REQUEST)
    differing = [key for key in request if found.get(key) != request[key]]
    if not differing:
        return
    if not force:
        raise RequestError(
            f"{folder} is the unfinished work of another request ({', '.join(differing)} differ); "
            "repeat that to finish it, or pass --force to start anew"
        )
    shutil.rmtree(folder)


class StatisticsFile:
    """The calibration file while its arrays are filled in, in any order."""

    def __init__(self, work: Work, provenance: Provenance, arrays: Arrays):
        """Creates the file, or opens it again if it is there with the same header."""
        self._path = work.folder / COMPLETE
        begin = header(arrays, provenance.as_metadata())
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in arrays.values()]
        ends = list(accumulate(sizes, initial=len(begin)))
        self._arrays, self._places = arrays, dict(zip(arrays, ends, strict=False))
        if not self._path.exists() or self._path.stat().st_size != ends[-1]:
            with self._path.open("wb") as file:
                file.write(begin)
                file.truncate(ends[-1])

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Fills in some arrays; they are on the disk when it returns."""
        with self._path.open("r+b") as file:
            for name, array in arrays.items():
                dtype, shape = self._arrays[name]
                if array.dtype != dtype or array.shape != shape:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {shape}")
                file.seek(self._places[name])
                file.write(np.ascontiguousarray(array).data)
            file.flush()
            os.fsync(file.fileno())
