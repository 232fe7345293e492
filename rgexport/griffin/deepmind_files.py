"""Opens DeepMind's orbax folders with tensorstore."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.griffin.tensor import RowTensor

_METADATA, _DATABASE, _ARRAY = "_METADATA", "manifest.ocdbt", "/.zarray"
_NESTED = "default"
"""The item that has the parameters, in an orbax checkpoint of several items."""
_KERNEL, _WEIGHT = ".kernel", ".weight"
"""The names of a matrix [in, out] in flax, and of its transpose in torch."""


View = Callable[[np.ndarray], np.ndarray]
"""A function that slices or transposes an array, without a copy."""


@dataclass(frozen=True)
class DeepMindTensor:
    """A tensor of a DeepMind checkpoint, in its stored shape; `view_rows` reads a view of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    view_rows: Callable[[View], RowTensor]

    def rows(self, view: View = lambda array: array) -> RowTensor:
        """Returns the tensor, or another view of it such as its transpose, in slabs of rows."""
        return self.view_rows(view)


DeepMindTensors = dict[str, DeepMindTensor | str]
"""DeepMind's name → tensor, or the type of a value that is no tensor."""


def orbax_folder(path: Path) -> Path | None:
    """Returns the folder that has the parameters, if `path` is an orbax checkpoint."""
    for folder in (path, path / _NESTED):
        if (folder / _METADATA).is_file() or (folder / _DATABASE).is_file():
            return folder
        if folder.is_dir() and any(folder.glob(f"params.*{_ARRAY}")):
            return folder
    return None


def read_orbax(folder: Path) -> DeepMindTensors:
    """Opens an orbax checkpoint; converts names and matrices to the form of DeepMind's torch files.

    Each parameter is a zarr array, in a folder of its own or in one OCDBT database for all, and in
    one compressed chunk, so it is read whole: the largest one of a 2B takes 1.3 GB of memory.

    Raises:
        NotInstalled: tensorstore is missing.
        RequestError: the folder cannot be read.
    """
    try:
        import tensorstore
    except ModuleNotFoundError:
        raise NotInstalled(
            f"{folder} is an orbax checkpoint, which needs tensorstore: "
            "pip install 'rgexport[orbax]'"
        ) from None
    tensors: DeepMindTensors = {}
    try:
        store = tensorstore.KvStore.open(_orbax_store(folder)).result()
        keys = sorted(key.decode() for key in store.list().result())
        for parameter in (key.removesuffix(_ARRAY) for key in keys if key.endswith(_ARRAY)):
            array = _open_array(folder, parameter)
            shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
            load: Callable[[], np.ndarray] = partial(_unpacked, folder, parameter)
            name = parameter.removeprefix("params.")
            if name.endswith(_KERNEL) and len(shape) == 2:
                name, shape = name.removesuffix(_KERNEL) + _WEIGHT, shape[::-1]
                load = partial(_transposed, folder, parameter)
            tensors[name] = DeepMindTensor(shape, dtype, partial(_view_rows, load, shape, dtype))
    except ValueError as error:  # tensorstore's
        raise _unreadable(folder, error) from None
    return tensors


def _view_rows(
    load: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: np.dtype, view: View
) -> RowTensor:
    def read(start: int, stop: int) -> np.ndarray:
        return np.array(view(load())[start:stop], order="C")

    return RowTensor(view(np.broadcast_to(np.zeros((), dtype), shape)).shape, dtype, read)


def _orbax_store(folder: Path) -> dict[str, Any]:
    files = {"driver": "file", "path": f"{folder.resolve().as_posix()}/"}
    if (folder / _DATABASE).is_file():
        return {"driver": "ocdbt", "base": files}
    return files


def _open_array(folder: Path, name: str) -> Any:
    import tensorstore

    store = _orbax_store(folder)
    store["path"] = f"{store.get('path', '')}{name}/"
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()


@lru_cache(maxsize=3)
def _unpacked(folder: Path, name: str) -> np.ndarray:
    try:
        return np.asarray(_open_array(folder, name).read().result())
    except ValueError as error:
        raise _unreadable(folder, error) from None


def _transposed(folder: Path, name: str) -> np.ndarray:
    return _unpacked(folder, name).T


def _unreadable(folder: Path, error: ValueError) -> RequestError:
    reason = " ".join(str(error).split())[:300]
    return RequestError(f"{folder} cannot be read: {reason}; copy it again")
