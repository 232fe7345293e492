"""Reads the tensors of an orbax folder, as DeepMind's flax release has them.

Each parameter is a zarr array, in a folder of its own or in one OCDBT database for all. Both are
read by tensorstore, which the extra `orbax` installs. Orbax stores a parameter in one compressed
chunk, so it is read whole: the largest one of a 2B, in bfloat16, takes 1.3 GB of memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.stored import RowMajor, Stored, Transposed
from rgexport.griffin.tensor import RowTensor

METADATA = "_METADATA"
_DATABASE = "manifest.ocdbt"
_ARRAY = "/.zarray"
_NESTED = "default"
"""The item of a checkpoint with several, that has the parameters."""
_KERNEL, _WEIGHT = ".kernel", ".weight"
"""flax's name of a matrix [in, out], and torch's of its transpose."""


def orbax_folder(path: Path) -> Path | None:
    """The folder that has the parameters, if `path` is an orbax checkpoint."""
    for folder in (path, path / _NESTED):
        if (folder / METADATA).is_file() or (folder / _DATABASE).is_file():
            return folder
        if folder.is_dir() and any(folder.glob(f"params.*{_ARRAY}")):
            return folder
    return None


def read_orbax(folder: Path) -> dict[str, Stored | str]:
    """The tensors of an orbax checkpoint by the names of DeepMind's torch files.

    Raises:
        RequestError: tensorstore is missing, or the folder cannot be read.
    """
    try:
        import tensorstore
    except ModuleNotFoundError as error:
        raise RequestError(
            f"{folder} is an orbax checkpoint, which needs tensorstore: "
            "pip install 'rgexport[orbax]'"
        ) from error
    try:
        store = tensorstore.KvStore.open(_place(folder)).result()
        keys = (key.decode() for key in store.list().result())
        names = [key.removesuffix(_ARRAY) for key in keys if key.endswith(_ARRAY)]
        return dict(_named(folder, sorted(names)))
    except ValueError as error:  # tensorstore's
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: ValueError) -> RequestError:
    reason = " ".join(str(error).split())[:300]
    return RequestError(f"{folder} cannot be read: {reason}; copy it again")


def _place(folder: Path) -> dict[str, Any]:
    files = {"driver": "file", "path": f"{folder.resolve().as_posix()}/"}
    if (folder / _DATABASE).is_file():
        return {"driver": "ocdbt", "base": files}
    return files


def _named(folder: Path, names: list[str]) -> Iterator[tuple[str, Stored]]:
    for name in names:
        array = _open(folder, name)
        dtype = np.dtype(array.dtype.numpy_dtype)
        tensor: Stored = _Array(folder, name, dtype, tuple(array.shape))
        short = name.removeprefix("params.")
        if short.endswith(_KERNEL) and len(tensor.shape) == 2:
            short, tensor = short.removesuffix(_KERNEL) + _WEIGHT, Transposed(tensor)
        yield short, tensor


def _open(folder: Path, name: str) -> Any:
    import tensorstore

    place = _place(folder)
    place["path"] = f"{place.get('path', '')}{name}/"
    return tensorstore.open({"driver": "zarr", "kvstore": place}, read=True).result()


@dataclass(frozen=True)
class _Array(RowMajor):
    """A parameter, or an item of its first axis."""

    folder: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    index: int | None = None

    def rows(self) -> RowTensor:
        """See `Stored`."""

        def read(start: int, stop: int) -> np.ndarray:
            return self._values()[start:stop].copy()

        return RowTensor(self.shape, self.dtype, read)

    def transposed(self) -> RowTensor:
        """See `Stored`."""

        def read(start: int, stop: int) -> np.ndarray:
            return np.ascontiguousarray(self._values()[:, start:stop].T)

        return RowTensor(self.shape[::-1], self.dtype, read)

    def item(self, index: int, shape: tuple[int, ...]) -> Stored:
        """See `RowMajor`."""
        return replace(self, index=index, shape=shape)

    def _values(self) -> np.ndarray:
        values = _unpacked(self.folder, self.name)
        return values if self.index is None else values[self.index].reshape(self.shape)


@lru_cache(maxsize=3)
def _unpacked(folder: Path, name: str) -> np.ndarray:
    """A whole parameter; those that are being read stay in memory."""
    try:
        return np.asarray(_open(folder, name).read().result())
    except ValueError as error:
        raise _unreadable(folder, error) from None
