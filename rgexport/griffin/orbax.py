"""Reads orbax checkpoints, the folders in which DeepMind publishes the models' flax weights."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.griffin.tensor import DeepMindTensor, DeepMindTensors, RowTensor, View

_METADATA = "_METADATA"
_DATABASE = "manifest.ocdbt"
_ARRAY = "/.zarray"

_NESTED = "default"
"""The item that has the parameters, in an orbax checkpoint of several items."""

_KERNEL = ".kernel"
"""The end of a matrix's name in flax, which stores it `[in, out]`."""
_WEIGHT = ".weight"
"""The end of a matrix's name in torch, which stores it `[out, in]`."""


def orbax_folder(path: Path) -> Path | None:
    """Returns the folder that has the parameters, if `path` is an orbax checkpoint."""
    for folder in (path, path / _NESTED):
        if _has_parameters(folder):
            return folder
    return None


def _has_parameters(folder: Path) -> bool:
    if (folder / _METADATA).is_file() or (folder / _DATABASE).is_file():
        return True
    return folder.is_dir() and any(folder.glob(f"params.*{_ARRAY}"))


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
            f"{folder} is an orbax checkpoint and needs tensorstore: pip install 'rgexport[orbax]'"
        ) from None

    tensors: DeepMindTensors = {}
    try:
        store = tensorstore.KvStore.open(_orbax_store(folder)).result()
        keys = sorted(key.decode() for key in store.list().result())
        for key in keys:
            if key.endswith(_ARRAY):
                name, tensor = _open_parameter(folder, key.removesuffix(_ARRAY))
                tensors[name] = tensor
    except ValueError as error:  # tensorstore's
        raise _unreadable(folder, error) from None
    return tensors


def _open_parameter(folder: Path, parameter: str) -> tuple[str, DeepMindTensor]:
    """Returns a parameter with its name and its shape in DeepMind's torch files."""
    array = _open_array(folder, parameter)
    shape = tuple(array.shape)
    dtype = np.dtype(array.dtype.numpy_dtype)
    name = parameter.removeprefix("params.")

    is_transposed = name.endswith(_KERNEL) and len(shape) == 2
    if is_transposed:
        name = name.removesuffix(_KERNEL) + _WEIGHT
        shape = shape[::-1]

    view_rows = partial(_view_rows, folder, parameter, shape, dtype, is_transposed)
    return name, DeepMindTensor(shape, dtype, view_rows)


def _view_rows(
    folder: Path,
    parameter: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    is_transposed: bool,
    view: View,
) -> RowTensor:
    """Returns a view of a parameter, such as its transpose, in slabs of rows."""
    # An array of one stored element gives the view's shape without the values.
    empty = np.broadcast_to(np.zeros((), dtype), shape)
    view_shape = view(empty).shape

    def read(start: int, stop: int) -> np.ndarray:
        array = _read_array(folder, parameter)
        if is_transposed:
            array = array.T
        return np.array(view(array)[start:stop], order="C")

    return RowTensor(view_shape, dtype, read)


def _orbax_store(folder: Path) -> dict[str, Any]:
    """Returns tensorstore's specification of a checkpoint's key-value store."""
    files = {"driver": "file", "path": f"{folder.resolve().as_posix()}/"}
    if (folder / _DATABASE).is_file():
        return {"driver": "ocdbt", "base": files}
    return files


def _open_array(folder: Path, parameter: str) -> Any:
    import tensorstore

    store = _orbax_store(folder)
    parent = store.get("path", "")
    store["path"] = f"{parent}{parameter}/"
    return tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()


# Slabs of one tensor are read one after another, and threads read a few tensors at a time.
@lru_cache(maxsize=3)
def _read_array(folder: Path, parameter: str) -> np.ndarray:
    try:
        return np.asarray(_open_array(folder, parameter).read().result())
    except ValueError as error:  # tensorstore's
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: ValueError) -> RequestError:
    reason = " ".join(str(error).split())[:300]
    return RequestError(f"{folder} cannot be read: {reason}; copy it again")
