"""The folder of an unfinished calibration: arrays for later steps, and the file so far.

Arrays are written atomically. The residual stream after a layer is written last, so its file means
that the layer is done.
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


class CalibrationFolder:
    """Arrays by name, or by name and the number of their step."""

    def __init__(self, path: Path):
        self.path = path

    def save(self, name: str, array: np.ndarray) -> None:
        """Writes an array atomically, and waits until it is on the disk."""
        path = self._path(name)
        remove_partials(path)
        with replacing(path, durable=True) as partial, partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    def load(self, name: str) -> np.ndarray | None:
        """Returns an array, None if there is none.

        Raises:
            RequestError: its file cannot be read.
        """
        try:
            array: np.ndarray = np.load(self._path(name), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError):
            raise RequestError(
                f"{self._path(name)} is damaged; remove {self.path} and run the command again"
            ) from None
        return array

    def drop(self, name: str) -> None:
        """Removes an array, if there is one."""
        self._path(name).unlink(missing_ok=True)

    def steps(self, name: str) -> list[int]:
        """Returns the steps K of arrays `NAME-K`, in ascending order."""
        pattern = re.compile(rf"{re.escape(name)}-(\d+)\.npy")
        matches = (pattern.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _path(self, name: str) -> Path:
        return self.path / f"{name}.npy"


def open_calibration_folder(
    folder: Path, request: Mapping[str, Any], *, force: bool
) -> CalibrationFolder:
    """Creates the folder, or opens that of an earlier run of the same request.

    Raises:
        RequestError: it has other files, or is another request's and `force` is not set.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _require_same(folder, request, force)
    if not (folder / _REQUEST).exists():
        folder.mkdir(exist_ok=True)
        text = json.dumps(request, indent=2, sort_keys=True) + "\n"
        (folder / _REQUEST).write_text(text, "utf-8")
    return CalibrationFolder(folder)


def _require_same(folder: Path, request: Mapping[str, Any], force: bool) -> None:
    """Removes the folder of another request with `force`, and keeps that of the same request."""
    if not (folder / _REQUEST).is_file():
        raise RequestError(
            f"{folder} exists and is no unfinished calibration; remove it, or pass another -o"
        )
    earlier = read_json(folder / _REQUEST)
    differing = [key for key in request if earlier.get(key) != request[key]]
    if not differing:
        return
    if not force:
        raise RequestError(
            f"{folder} is the unfinished work of another request ({', '.join(differing)} differ); "
            "repeat that to finish it, or pass --force to start anew"
        )
    shutil.rmtree(folder)


class StatisticsFile:
    """The calibration file, whose arrays are written in any order."""

    def __init__(self, folder: CalibrationFolder, provenance: Provenance, arrays: Arrays):
        """Creates the file, or opens it again if it has the same size."""
        self._path = folder.path / COMPLETE
        begin = header(arrays, provenance.as_metadata())
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in arrays.values()]
        ends = list(accumulate(sizes, initial=len(begin)))
        self._arrays, self._offsets = arrays, dict(zip(arrays, ends, strict=False))
        if not self._path.exists() or self._path.stat().st_size != ends[-1]:
            with self._path.open("wb") as file:
                file.write(begin)
                file.truncate(ends[-1])

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes some arrays, and waits until they are on the disk."""
        with self._path.open("r+b") as file:
            for name, array in arrays.items():
                dtype, shape = self._arrays[name]
                if array.dtype != dtype or array.shape != shape:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {shape}")
                file.seek(self._offsets[name])
                file.write(np.ascontiguousarray(array).data)
            file.flush()
            os.fsync(file.fileno())
