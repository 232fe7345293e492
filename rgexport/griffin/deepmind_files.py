"""Opens DeepMind's `.pt` files with torch, and its orbax folders with tensorstore."""

import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import NotInstalled, RequestError
from rgexport.files.paths import require_regular
from rgexport.griffin.tensor import DTYPES, RowTensor, advise_kernel

MAX_PICKLE_BYTES = 2 << 20
"""Limit of a `.pt` file's pickle: a 9B has 0.1 MB."""
MAX_NAMES, MAX_DEPTH = 1 << 16, 16
"""Limits of nested dictionaries, which may hold one another many times."""

_PICKLE = "/data.pkl"
_MADV_DONTNEED = 4
_BLOCKED = re.compile(r"GLOBAL (\S+)")
_METADATA, _DATABASE, _ARRAY = "_METADATA", "manifest.ocdbt", "/.zarray"
_NESTED = "default"
"""The item that has the parameters, in an orbax checkpoint of several items."""
_KERNEL, _WEIGHT = ".kernel", ".weight"
"""The names of a matrix [in, out] in flax, and of its transpose in torch."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in its stored shape.

    `load` returns the whole tensor as an array that must not be changed: a view of a mapped file
    (if `is_mapped`), or a decompressed chunk.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    is_mapped: bool = False

    def rows(self, view: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> RowTensor:
        """Returns the tensor, or another view of it such as its transpose, in slabs of rows."""

        def read(start: int, stop: int) -> np.ndarray:
            array = self.load()
            rows = np.array(view(array)[start:stop], order="C")
            if self.is_mapped:  # pages that stay mapped count as memory of the process
                address = array.ctypes.data
                advise_kernel(address, address + array.nbytes, _MADV_DONTNEED)
            return rows

        shape = view(np.broadcast_to(np.zeros((), self.dtype), self.shape)).shape
        return RowTensor(shape, self.dtype, read)


StoredTensors = dict[str, StoredTensor | str]
"""DeepMind's name → tensor, or the type of a value that is no tensor."""


def read_torch_file(path: Path) -> StoredTensors:
    """Maps a `torch.save` file; the names of nested dictionaries are joined with dots.

    Raises:
        NotInstalled: torch is missing.
        RequestError: a missing, damaged or legacy file, one that holds more than tensors, or a
            tensor that is not row-major.
    """
    try:
        size = require_regular(path)
        _check_archive(path, size)
        content = _load_mapped(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise RequestError(f"{path} holds {kind}; expected a dictionary of tensors")
    tensors: StoredTensors = {}
    for name, value in _leaves(path, content, "", 0):
        if name in tensors or len(tensors) == MAX_NAMES:
            problem = "twice" if name in tensors else f"and {MAX_NAMES} more"
            raise _damaged(path, f"it has the entry {name} {problem}")
        tensors[name] = _mapped_tensor(path, name, value)
    return tensors


def _check_archive(path: Path, size: int) -> None:
    """Refuses what torch would misread, or what would fill the memory."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(4)
        if start.startswith(b"\x80"):
            raise RequestError(
                f"{path} is in torch's legacy format; expected the zip format of torch ≥ 1.6: "
                "load it with weights_only=True and save it again"
            )
        if start == b"PK\x03\x04":
            raise RequestError(f"{path} is truncated; copy or download it again")
        raise RequestError(f"{path} is not a torch checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_records(path, archive, size)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise _damaged(path, str(error) or "it ends too early") from None


def _check_records(path: Path, archive: zipfile.ZipFile, size: int) -> None:
    records = archive.infolist()
    for info in records:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _damaged(path, f"its record {info.filename} is compressed")
        if info.header_offset + info.file_size > size:
            raise _damaged(path, "a record in it ends after the file")
    pickles = [info for info in records if info.filename.endswith(_PICKLE)]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise _damaged(path, f"it needs one {_PICKLE[1:]} of at most {MAX_PICKLE_BYTES} bytes")
    after_tuple, memoized_tuples = False, set()
    for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
        if opcode.name in ("BINGET", "LONG_BINGET") and argument in memoized_tuples:
            # Each use doubles the work to hash it, if such tuples contain one another.
            raise ValueError("it has a tuple twice")
        if opcode.name not in ("BINPUT", "LONG_BINPUT"):
            after_tuple = opcode.name.startswith("TUPLE")
        elif after_tuple:
            memoized_tuples.add(argument)


def _load_mapped(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise NotInstalled(
            f"{path} is a torch checkpoint, which needs torch: pip install 'rgexport[export]'"
        ) from None
    try:
        with warnings.catch_warnings(action="ignore"):  # such as one of an unusual protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever damage leads it to
        if blocked := _BLOCKED.search(str(error)):
            raise RequestError(
                f"{path} holds Python objects other than tensors ({blocked[1]}), which could run "
                "code; expected a plain state dictionary"
            ) from None
        raise RequestError(
            f"{path} is damaged, or holds more than tensors; expected a plain state dictionary"
        ) from None


def _leaves(
    path: Path, content: dict[Any, Any], prefix: str, depth: int
) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise _damaged(path, "its dictionaries are nested too deeply")
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(path, value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _mapped_tensor(path: Path, name: str, tensor: Any) -> StoredTensor | str:
    """Returns a view of a tensor of torch; a matrix may be stored transposed."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return type(tensor).__name__
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return f"{dtype} ({tensor.layout}, {tensor.device})"
    if not tensor.is_contiguous() and not (tensor.dim() == 2 and tensor.T.is_contiguous()):
        raise RequestError(
            f"{path}: tensor {name} {list(tensor.shape)} is not stored row by row; "
            "save it again after .contiguous()"
        )
    if dtype == "bfloat16":
        array = tensor.detach().view(torch.int16).numpy().view(DTYPES["bfloat16"])
    elif tensor.dtype in (torch.float32, torch.float16, torch.float64) or not (
        tensor.is_floating_point() or tensor.is_complex()
    ):
        array = tensor.detach().numpy()
    else:
        return dtype
    return StoredTensor(array.shape, array.dtype, lambda: array, is_mapped=True)


def _damaged(path: Path, reason: str) -> RequestError:
    return RequestError(f"{path} is damaged: {reason}; copy or download it again")


def orbax_folder(path: Path) -> Path | None:
    """Returns the folder that has the parameters, if `path` is an orbax checkpoint."""
    for folder in (path, path / _NESTED):
        if (folder / _METADATA).is_file() or (folder / _DATABASE).is_file():
            return folder
        if folder.is_dir() and any(folder.glob(f"params.*{_ARRAY}")):
            return folder
    return None


def read_orbax(folder: Path) -> StoredTensors:
    """Opens an orbax checkpoint; names and matrices become those of DeepMind's torch files.

    Each parameter is a zarr array, in a folder of its own or in one OCDBT database for all. Orbax
    stores it in one compressed chunk, so it is read whole: the largest one of a 2B, in bfloat16,
    takes 1.3 GB of memory.

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
    tensors: StoredTensors = {}
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
            tensors[name] = StoredTensor(shape, dtype, load)
    except ValueError as error:  # tensorstore's
        raise _unreadable(folder, error) from None
    return tensors


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
