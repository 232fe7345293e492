"""The folder of an unfinished calibration, from which a later run continues.

`request.json` has the options and weights of the run; only an equal request may continue it.
`NAME.npy` or `NAME-N.npy` are intermediate arrays, such as the residual stream after N layers.
`complete` is the calibration file, which becomes the target when all its arrays are written. A
step through a layer writes its statistics first and the residual stream, or the gradient, last.
So the numbers of these arrays tell which layers are done.
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
from rgexport.quantize.algorithms.calibration_file import Arrays, Provenance


class CalibrationFolder:
    """Intermediate arrays, one file each, by names such as `tokens` or `stream-3`."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def open(cls, path: Path, request: Mapping[str, Any], *, force: bool) -> "CalibrationFolder":
        """Creates the folder, or opens one with an equal request; `force` replaces another one."""
        file = path / "request.json"
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not file.is_file():
                raise RequestError(
                    f"{path} exists and is no unfinished calibration; remove it, or pass another -o"
                )
            earlier = read_json(file)
            differing = [key for key in request if earlier.get(key) != request[key]]
            if differing and not force:
                raise RequestError(
                    f"{path} is the unfinished work of another request ({', '.join(differing)} "
                    "differ); repeat that to finish it, or pass --force to start anew"
                )
            if differing:
                shutil.rmtree(path)
        if not file.exists():
            path.mkdir(exist_ok=True)
            file.write_text(json.dumps(request, indent=2, sort_keys=True) + "\n", "utf-8")
        return cls(path)

    def save(self, name: str, array: np.ndarray) -> None:
        path = self._path(name)
        remove_partials(path)
        with replacing(path, durable=True) as partial, partial.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    def load(self, name: str) -> np.ndarray | None:
        try:
            array: np.ndarray = np.load(self._path(name), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError):
            raise RequestError(
                f"{self._path(name)} is damaged; remove {self.path} and run the command again"
            ) from None
        return array

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def steps(self, name: str) -> list[int]:
        """Returns the numbers N of the saved arrays `name-N`, in ascending order."""
        pattern = re.compile(rf"{re.escape(name)}-(\d+)\.npy")
        matches = (pattern.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _path(self, name: str) -> Path:
        return self.path / f"{name}.npy"


class StatisticsFile:
    """The calibration file, a safetensors file; its arrays may be written in any order."""

    def __init__(self, folder: CalibrationFolder, provenance: Provenance, arrays: Arrays):
        """Creates the file at its full size; keeps one of that size, from an earlier run."""
        self._path = folder.path / COMPLETE
        file_header = header(arrays, provenance.as_metadata())
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in arrays.values()]
        *offsets, size = accumulate(sizes, initial=len(file_header))
        self._arrays, self._offsets = arrays, dict(zip(arrays, offsets, strict=True))
        if not self._path.exists() or self._path.stat().st_size != size:
            with self._path.open("wb") as file:
                file.write(file_header)
                file.truncate(size)

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        with self._path.open("r+b") as file:
            for name, array in arrays.items():
                dtype, shape = self._arrays[name]
                if array.dtype != dtype or array.shape != shape:
                    raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {shape}")
                file.seek(self._offsets[name])
                file.write(np.ascontiguousarray(array).data)
            file.flush()
            os.fsync(file.fileno())
