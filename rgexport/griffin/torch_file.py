"""Reads where the tensors of a `torch.save` file lie, without torch and without running anything.

Format (`torch.serialization`): an uncompressed zip archive with a pickle `NAME/data.pkl` and a
record `NAME/data/KEY` for each storage. In the pickle, nested dictionaries hold calls
`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`; a storage is
the persistent id `("storage", type, KEY, device, count)`.

Python's own unpickler reads the pickle, with the opcodes that such files need, and with functions
of ours in place of torch's: the pickle can call nothing else.

Why not `torch.load(path, mmap=True, weights_only=True)`: mapped pages count as memory of the
process (779 MB after reading a file of 805 MB in slabs), it believes a storage's stated size, and
nested tuples as a key keep it busy for ever.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.regular_file import require_regular
from rgexport.griffin.tensor import DTYPES

MAX_PICKLE_BYTES = 2 << 20
"""Far above what a model needs (9B: 0.1 MB). The worst pickle of 2 MB takes 1.5 s and 180 MB."""
MAX_NAMES, MAX_DEPTH, MAX_RANK = 1 << 16, 16, 16
"""Of nested dictionaries and of shapes, far above what a model needs. Without a limit, a few
dictionaries that hold one another twice would have more names than fit into any memory."""

_PICKLE = "/data.pkl"
_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": DTYPES["float32"],
    "HalfStorage": DTYPES["float16"],
    "BFloat16Storage": DTYPES["bfloat16"],
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
"""torch's name of a storage's type → dtype."""


@dataclass(frozen=True)
class Located:
    """A row-major tensor in a file, `offset` bytes from its start."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def locate_tensors(path: Path) -> dict[str, Located | str]:
    """The tensors of a (nested) dictionary; nested names are joined with dots.

    What is no tensor is given as the name of its type.

    Raises:
        RequestError: no such file, a damaged or legacy file, a pickle that would run code, or a
            tensor that is not row-major.
    """
    try:
        size = require_regular(path)
        with path.open("rb") as file:
            content = _read(path, file, size)
        return _locate_all(path, content)
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except (KeyError, pickle.UnpicklingError):  # an opcode or a record that is not known
        raise RequestError(
            f"{path} is damaged, or holds more than tensors; expected a plain state dictionary"
        ) from None
    except Exception as error:  # zipfile and pickle raise whatever damage leads them to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(f"{path} is damaged: {reason}; copy or download it again") from None


@dataclass(frozen=True)
class _Storage:
    """`count` elements, `offset` bytes from the start of the file."""

    dtype: np.dtype
    count: int
    offset: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; `skip` and `stride` count elements."""

    storage: _Storage
    skip: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


Places = dict[str, tuple[int, int]]
"""Key of a storage → where it begins in the file, and its bytes."""


def _read(path: Path, file: BinaryIO, size: int) -> Any:
    """The content of the pickle, with `_Tensor` and `_Storage` in place of torch's objects."""
    if not zipfile.is_zipfile(file):
        raise _not_zip(path, file)
    with zipfile.ZipFile(file) as archive:
        info = _find_pickle(archive.infolist())
        prefix = info.filename.removesuffix(_PICKLE) + "/data/"
        places: Places = {}
        for record in archive.infolist():
            if record.filename.startswith(prefix):
                with archive.open(record):  # reads the record's own header, up to its end
                    places[record.filename.removeprefix(prefix)] = file.tell(), record.file_size
        if any(start + length > size for start, length in places.values()):
            raise ValueError("a record in it ends after the file")
        return _Unpickler(path, archive.read(info), places).load()


def _not_zip(path: Path, file: BinaryIO) -> RequestError:
    file.seek(0)
    start = file.read(4)
    if start.startswith(b"\x80"):
        return RequestError(
            f"{path} is in torch's legacy format; expected the zip format of torch ≥ 1.6: "
            "load it with weights_only=True and save it again"
        )
    if start == b"PK\x03\x04":
        return RequestError(f"{path} is truncated; copy or download it again")
    return RequestError(f"{path} is not a torch checkpoint")


def _find_pickle(records: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    for info in records:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its record {info.filename} is compressed")
    if len({info.filename for info in records}) < len(records):
        raise ValueError("it has a record twice")
    pickles = [info for info in records if info.filename.endswith(_PICKLE)]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"it needs one {_PICKLE[1:]} of at most {MAX_PICKLE_BYTES} bytes")
    return pickles[0]


class _OrderedDict(dict):
    """In place of `collections.OrderedDict`; always made empty."""

    def __init__(self) -> None:
        super().__init__()


def _tensor(
    storage: Any, skip: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any
) -> _Tensor:
    """In place of `torch._utils._rebuild_tensor_v2`."""
    typed = type(shape) is type(stride) is tuple and type(requires_grad) is bool
    if not typed or not isinstance(storage, _Storage):
        raise ValueError("a tensor in it has no storage, or no shape")
    if len(shape) > MAX_RANK or len(shape) != len(stride):
        raise ValueError("a tensor in it has too many axes, or not as many strides")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (skip, *shape, *stride)):
        raise ValueError("a tensor in it has a size, a stride or an offset that is none")
    return _Tensor(storage, skip, shape, stride)


def _parameter(tensor: _Tensor, requires_grad: Any, hooks: Any) -> _Tensor:
    """In place of `torch._utils._rebuild_parameter`."""
    return _tensor(tensor.storage, tensor.skip, tensor.shape, tensor.stride, requires_grad, hooks)


_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": _OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
"""All that a pickle may name."""


class _Unpickler(pickle._Unpickler):
    """Reads a state dictionary.

    It is the unpickler that is written in Python: the one in C takes gigabytes for one large index
    of its memo, and its opcodes are fixed.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]]
        for code in (
            *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE),
            *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
            *(pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
            *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
            *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINUNICODE, pickle.BINFLOAT),
            *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINPERSID),
        )
    }

    def __init__(self, path: Path, stream: bytes, places: Places) -> None:
        super().__init__(io.BytesIO(stream))
        self._path, self._places = path, places
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") in _GLOBALS:
            return _GLOBALS[full]
        raise RequestError(
            f"{self._path} holds Python objects other than tensors ({full}), which could run "
            "code; expected a plain state dictionary"
        )

    def persistent_load(self, stated: Any) -> _Storage:
        word, dtype, key, _, count = stated
        if word != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise ValueError("a storage in it has no type, or no record")
        offset, size = self._places[key]
        if type(count) is not int or count * dtype.itemsize != size:
            raise ValueError(f"its record {key} of {size} bytes is said to have another size")
        storage = _Storage(dtype, count, offset)
        if self._storages.setdefault(key, storage) != storage:
            raise ValueError(f"its record {key} has two types")
        return storage

    def load_build(self) -> None:
        """Ignores the attributes of a dictionary (`_metadata`); nothing else has any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _OrderedDict):
            raise ValueError("it sets attributes of something that has none")

    def load_setitem(self) -> None:
        self._set([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        """Adds keys and values in turn; a key of nested tuples could take for ever to hash."""
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or type(key) not in (str, int):
                raise ValueError(f"it has a name of type {type(key).__name__}")
            target[key] = value

    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _locate_all(path: Path, content: Any) -> dict[str, Located | str]:
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise RequestError(f"{path} holds {kind}; expected a dictionary of tensors")
    found: dict[str, Located | str] = {}
    for name, value in _leaves(content, "", 0):
        if name in found or len(found) == MAX_NAMES:
            what = "twice" if name in found else f"and {MAX_NAMES} more"
            raise ValueError(f"it has the entry {name} {what}")
        is_tensor = isinstance(value, _Tensor)
        found[name] = _locate(path, name, value) if is_tensor else type(value).__name__
    return found


def _leaves(content: dict[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise ValueError("its dictionaries are nested too deeply")
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _locate(path: Path, name: str, tensor: _Tensor) -> Located:
    if not _is_row_major(tensor):
        raise RequestError(
            f"{path}: tensor {name} {list(tensor.shape)} is not stored row by row; "
            "save it again after .contiguous()"
        )
    storage = tensor.storage
    if tensor.skip + math.prod(tensor.shape) > storage.count:
        raise ValueError(f"its tensor {name} does not lie in its record")
    offset = storage.offset + tensor.skip * storage.dtype.itemsize
    return Located(path, storage.dtype, tensor.shape, offset)


def _is_row_major(tensor: _Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != step:
            return 0 in tensor.shape
        step *= size
    return True
