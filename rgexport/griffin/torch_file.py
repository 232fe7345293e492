"""Opens `torch.save` files without torch, and without running anything.

Format (`torch.serialization`): an uncompressed zip archive with a pickle `NAME/data.pkl` and a
record `NAME/data/KEY` for each storage. In the pickle, nested dictionaries hold calls
`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`; a storage is
the persistent id `("storage", type, KEY, device, count)`. `pickletools` takes the stream apart, and
the opcodes that such files need build plain data, with functions of ours in place of torch's.
(`torch.load` with `mmap` and `weights_only` dies with a file that is cut, and believes stated
sizes.)
"""

import itertools
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.paths import require_regular
from rgexport.griffin.tensor import (
    DTYPES,
    DeepMindTensor,
    DeepMindTensors,
    RowTensor,
    View,
    file_rows,
    transposed_rows,
)

MAX_PICKLE_BYTES = 2 << 20
"""A 9B's pickle has 0.1 MB. The worst one of 2 MB takes 1.5 s and 180 MB."""
MAX_NAMES, MAX_DEPTH, MAX_RANK = 1 << 16, 16, 16
"""Limits of nested dictionaries, which may hold one another twice, and of shapes."""

_MAX_ELEMENTS = 1 << 56
_PICKLE, _LITTLE = "/data.pkl", b"little"
_NUMPY_NAMES = {"Float": "float32", "Half": "float16", "Double": "float64", "Long": "int64"}
_NUMPY_NAMES |= {"Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
_DTYPES = {"BFloat16Storage": DTYPES["bfloat16"]}
_DTYPES |= {f"{name}Storage": np.dtype(numpy) for name, numpy in _NUMPY_NAMES.items()}


def read_torch_file(path: Path) -> DeepMindTensors:
    """Opens the tensors of a dictionary; the names of nested dictionaries are joined with dots.

    Raises RequestError for a damaged or legacy file, a pickle that would run code, and a tensor
    that is not row-major.
    """
    try:
        size = require_regular(path)
        with path.open("rb") as file:
            content = _read(path, file, size)
        return _tensors(path, content)
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except KeyError:  # an opcode or a record that is not known
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


Records = dict[str, tuple[int, int]]
"""Key of a storage → its offset in the file, and its bytes."""


def _read(path: Path, file: BinaryIO, size: int) -> Any:
    """Returns the content of the pickle, with `_Tensor` and `_Storage` for torch's objects."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        start, problem = file.read(4), "is not a torch checkpoint"
        if start.startswith(b"\x80"):
            problem = (
                "is in torch's legacy format; expected the zip format of torch ≥ 1.6: "
                "load it with weights_only=True and save it again"
            )
        elif start == b"PK\x03\x04":
            problem = "is truncated; copy or download it again"
        raise RequestError(f"{path} {problem}")
    with zipfile.ZipFile(file) as archive:
        info = _find_pickle(archive.infolist())
        folder = info.filename.removesuffix(_PICKLE)
        order = next((r for r in archive.infolist() if r.filename == f"{folder}/byteorder"), None)
        if order and (order.file_size > len(_LITTLE) or archive.read(order) != _LITTLE):
            raise ValueError("its numbers are not little-endian")
        prefix = f"{folder}/data/"
        records: Records = {}
        for record in archive.infolist():
            if record.filename.startswith(prefix):
                with archive.open(record):  # reads the record's own header, up to its end
                    records[record.filename.removeprefix(prefix)] = file.tell(), record.file_size
        if any(start + length > size for start, length in records.values()):
            raise ValueError("a record in it ends after the file")
        return _Reader(path, records).read(archive.read(info))


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


class _OrderedDict(dict[Any, Any]):
    """Stands for `collections.OrderedDict`; always made empty."""

    def __init__(self) -> None:
        super().__init__()


def _tensor(
    storage: Any, skip: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any
) -> _Tensor:
    """Stands for `torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage) or not type(shape) is type(stride) is tuple:
        raise ValueError("a tensor in it has no storage, or no shape")
    sizes = skip, *shape, *stride
    are_sizes = all(type(size) is int and 0 <= size < 1 << 62 for size in sizes)
    if len(shape) > MAX_RANK or len(shape) != len(stride) or not are_sizes:
        raise ValueError("a tensor in it has axes, strides or an offset that no tensor has")
    return _Tensor(storage, skip, shape, stride)


def _parameter(tensor: _Tensor, requires_grad: Any, hooks: Any) -> _Tensor:
    """Stands for `torch._utils._rebuild_parameter`."""
    return _tensor(tensor.storage, tensor.skip, tensor.shape, tensor.stride, requires_grad, hooks)


_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": _OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
}
_FUNCTIONS = _OrderedDict, _tensor, _parameter


class _Reader:
    """Builds plain data from a pickle; calls only `_FUNCTIONS`."""

    def __init__(self, path: Path, records: Records) -> None:
        self._path, self._records = path, records
        self._storages: dict[str, _Storage] = {}
        self.memo: dict[int, Any] = {}
        self._outer: list[list[Any]] = []
        self.stack: list[Any] = []

    def read(self, stream: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            _OPCODES[opcode.name](self, argument)
        (content,) = self.stack
        return content

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def mark(self) -> None:
        self._outer.append(self.stack)
        self.stack = []

    def pop_marked(self) -> list[Any]:
        """Removes and returns the values since the last mark; no opcode reaches below it."""
        values, self.stack = self.stack, self._outer.pop()
        return values

    def push_global(self, name: str) -> None:
        name = name.replace(" ", ".")
        if name not in _GLOBALS:
            raise RequestError(
                f"{self._path} holds Python objects other than tensors ({name}), which could run "
                "code; expected a plain state dictionary"
            )
        self.push(_GLOBALS[name])

    def push_storage(self, stated: Any) -> None:
        tag, dtype, key, _, count = stated
        if tag != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise ValueError("a storage in it has no type, or no record")
        offset, size = self._records[key]
        if type(count) is not int or count * dtype.itemsize != size:
            raise ValueError(f"its record {key} of {size} bytes is said to have another size")
        storage = _Storage(dtype, count, offset)
        if self._storages.setdefault(key, storage) != storage:
            raise ValueError(f"its record {key} has two types")
        self.push(storage)

    def call(self, function: Any, arguments: Any) -> None:
        if not any(function is known for known in _FUNCTIONS):
            raise TypeError(f"it calls a {type(function).__name__}")
        self.push(function(*arguments))

    def extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("it appends to something that is no list")
        self.stack[-1].extend(values)

    def set_items(self, items: list[Any]) -> None:
        """Adds keys and values in turn; a key of nested tuples could take for ever to hash."""
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            is_short = type(key) is int and -(2**31) <= key < 2**31  # others may share a hash
            if not isinstance(target, dict) or not (type(key) is str or is_short):
                raise ValueError(f"it has a name that is no text ({type(key).__name__})")
            target[key] = value

    def skip_attributes(self) -> None:
        """Drops the attributes of a dictionary (`_metadata`); nothing else has any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _OrderedDict):
            raise ValueError("it sets attributes of something that has none")


_OPCODES: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda reader, _: None,
    "STOP": lambda reader, _: None,
    "MARK": lambda reader, _: reader.mark(),
    "BUILD": lambda reader, _: reader.skip_attributes(),
    "GLOBAL": _Reader.push_global,
    "BINPERSID": lambda reader, _: reader.push_storage(*reader.pop(1)),
    "REDUCE": lambda reader, _: reader.call(*reader.pop(2)),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "TUPLE1": lambda reader, _: reader.push(tuple(reader.pop(1))),
    "TUPLE2": lambda reader, _: reader.push(tuple(reader.pop(2))),
    "TUPLE3": lambda reader, _: reader.push(tuple(reader.pop(3))),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.pop_marked())),
    "APPEND": lambda reader, _: reader.extend(reader.pop(1)),
    "APPENDS": lambda reader, _: reader.extend(reader.pop_marked()),
    "SETITEM": lambda reader, _: reader.set_items(reader.pop(2)),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_marked()),
    **dict.fromkeys(
        ("BINPUT", "LONG_BINPUT"), lambda r, index: r.memo.update({index: r.stack[-1]})
    ),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda r, index: r.push(r.memo[index])),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _Reader.push),
    **dict.fromkeys(("BINFLOAT", "BINUNICODE"), _Reader.push),
}
"""The opcodes that state dictionaries need, by `pickletools`' names."""


def _tensors(path: Path, content: Any) -> DeepMindTensors:
    if not isinstance(content, dict):
        raise RequestError(
            f"{path} holds {type(content).__name__}; expected a dictionary of tensors"
        )
    tensors: DeepMindTensors = {}
    for name, value in _leaves(content, "", 0, itertools.count(1)):
        if name in tensors or len(tensors) == MAX_NAMES:
            problem = "twice" if name in tensors else f"and {MAX_NAMES} more"
            raise ValueError(f"it has the entry {name} {problem}")
        is_tensor = isinstance(value, _Tensor)
        tensors[name] = _opened(path, name, value) if is_tensor else type(value).__name__
    return tensors


def _leaves(
    content: dict[Any, Any], prefix: str, depth: int, count: "itertools.count[int]"
) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH or next(count) > MAX_NAMES:
        raise ValueError("its dictionaries are nested too deeply, or too many")
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.", depth + 1, count)
        else:
            yield f"{prefix}{key}", value


def _opened(path: Path, name: str, tensor: _Tensor) -> DeepMindTensor:
    """Checks where a tensor lies; a matrix may be stored transposed, as `weight.T` is saved."""
    storage, shape = tensor.storage, tensor.shape
    row_major = _is_row_major(shape, tensor.stride)
    if not row_major and not (len(shape) == 2 and _is_row_major(shape[::-1], tensor.stride[::-1])):
        raise RequestError(
            f"{path}: {name} {list(shape)} is not stored row by row; save it after .contiguous()"
        )
    if tensor.skip + math.prod(shape) > storage.count:
        raise ValueError(f"its tensor {name} does not lie in its record")
    if math.prod(max(size, 1) for size in shape) >= _MAX_ELEMENTS:  # of an empty one
        raise ValueError(f"its tensor {name} has the shape {list(shape)}")
    offset = storage.offset + tensor.skip * storage.dtype.itemsize
    return DeepMindTensor(
        shape,
        storage.dtype,
        lambda view: _view_rows(path, storage.dtype, shape, not row_major, offset, view),
    )


def _view_rows(
    path: Path, dtype: np.dtype, shape: tuple[int, ...], transposed: bool, offset: int, view: View
) -> RowTensor:
    """Reads a view of a tensor: of an array without memory, which has only shape and strides."""
    sizes = shape[::-1] if transposed else shape
    strides = [dtype.itemsize * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    stored = np.lib.stride_tricks.as_strided(np.zeros(1, dtype), sizes, strides)
    whole = stored.T if transposed else stored
    part = view(whole)
    start = offset + part.ctypes.data - whole.ctypes.data
    if _is_row_major(part.shape, tuple(step // dtype.itemsize for step in part.strides)):
        return file_rows(path, part.shape, dtype, start)
    matrix = transposed_rows(path, (part.shape[-1], len(part)), dtype, start)

    def read(first: int, last: int) -> np.ndarray:
        return matrix.read(first, last).reshape(last - first, *part.shape[1:])

    return RowTensor(part.shape, dtype, read)


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True
