"""Reads where the tensors of a `torch.save` file lie, without loading or running anything.

torch parses the pickle (`weights_only=True`, so that no code runs) under fake tensors, which
note the file offset of each storage in the private `_checkpoint_offset`. It is checked against
the offsets in the zip directory, so that a change in torch cannot make us read wrong bytes.
"""

import logging
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.tensor import DTYPES
from rgexport.regular_file import require_regular

if TYPE_CHECKING:
    import torch

_STORAGE = re.compile(r".+/data/\d+")
_PICKLE = "/data.pkl"
_PLAIN = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)|collections OrderedDict|torch \w+Storage"
)
MAX_SMALL_BYTES = 4096
"""Of a record that is neither the pickle nor a storage, such as the byte order."""
MAX_PICKLE_BYTES, MAX_NAMES, MAX_DEPTH = 16 << 20, 1 << 16, 16
"""Of a file without its storages, and of the dictionaries in it: far above what a model needs. A
few nested ones that hold one another twice would have more names than fit into any memory."""
_LOCAL_HEADER_BYTES = 30  # of a zip record, before its name and its extra field


@dataclass(frozen=True)
class Located:
    """A row-major tensor in a file, `offset` bytes from its start; `dtype` as torch names it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The dtype to read it in, or None if weights cannot have it."""
        return DTYPES.get(self.dtype)


def locate_tensors(path: Path) -> dict[str, Located | str]:
    """The tensors of a (nested) dictionary; nested names are joined with dots.

    What is no tensor is given as the name of its type.

    Raises:
        RequestError: no torch, no such file, a damaged or legacy file, a pickle that would run
            code, or a tensor that is not row-major.
    """
    records = _records(path)
    content = _load(path)
    if not isinstance(content, dict):
        raise RequestError(
            f"{path} holds {type(content).__name__}; expected a dictionary of tensors"
        )
    return {name: _locate(path, name, value, records) for name, value in _named(path, content)}


def _records(path: Path) -> dict[int, int]:
    """Offset → size of the storages in the zip archive."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise _not_zip(path)
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                _check_records(records)
                for info in records:
                    if info.filename.endswith(_PICKLE):
                        offset, size = _record(file, info)
                        file.seek(offset)
                        _check_names(path, file.read(size))
                storages = [i for i in records if _STORAGE.fullmatch(i.filename)]
                return dict(_record(file, info) for info in storages)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except RequestError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged directory leads it to
        raise RequestError(
            f"{path} is damaged: {_first_line(error)}; copy or download it again"
        ) from None


def _check_records(records: list[zipfile.ZipInfo]) -> None:
    """All but the storages is read whole by torch, which would also unpack what is compressed.

    Raises:
        BadZipFile: a record is compressed, there twice, or larger than any pickle of names.
    """
    for info in records:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise zipfile.BadZipFile(f"its record {info.filename} is compressed")
        most = MAX_PICKLE_BYTES if info.filename.endswith(_PICKLE) else MAX_SMALL_BYTES
        if info.file_size > most and not _STORAGE.fullmatch(info.filename):
            raise zipfile.BadZipFile(f"its record {info.filename} has {info.file_size} bytes")
    if len({info.filename for info in records}) < len(records):
        raise zipfile.BadZipFile("it has a record twice")


def _not_zip(path: Path) -> RequestError:
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"\x80"):
        return RequestError(
            f"{path} is in torch's legacy format; expected the zip format of torch ≥ 1.6: "
            "load it with weights_only=True and save it again"
        )
    if start == b"PK\x03\x04":
        return RequestError(f"{path} is truncated; copy or download it again")
    return RequestError(f"{path} is not a torch checkpoint")


def _check_names(path: Path, content: bytes) -> None:
    """Refuses a pickle that names anything but what plain state dictionaries are made of.

    Not all that torch allows is harmless: `bytearray` of a large number fills the memory.

    Raises:
        RequestError: it names something else.
        ValueError: it is no pickle.
    """
    for opcode, name, _ in pickletools.genops(content):
        if "GLOBAL" in opcode.name and not _PLAIN.fullmatch(str(name)):
            raise _other_object(path, str(name).replace(" ", "."))


def _other_object(path: Path, name: str) -> RequestError:
    return RequestError(
        f"{path} holds Python objects other than tensors ({name}), which could run code; "
        "expected a plain state dictionary"
    )


def _record(file: Any, info: zipfile.ZipInfo) -> tuple[int, int]:
    file.seek(info.header_offset + _LOCAL_HEADER_BYTES - 4)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return info.header_offset + _LOCAL_HEADER_BYTES + name + extra, info.file_size


def _load(path: Path) -> Any:
    """The file's content with fake tensors."""
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise RequestError(
            f"reading {path.name} needs torch; pip install 'rgexport[export]'"
        ) from None
    try:
        with warnings.catch_warnings(), _silenced(), FakeTensorMode():
            warnings.simplefilter("ignore")  # what is odd about the file is told by the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(f"{path} {_explain_refusal(error)}") from None
    except Exception as error:  # torch raises whatever a damaged pickle leads it to
        raise RequestError(f"{path} is damaged: {_first_line(error)}") from None


@contextmanager
def _silenced() -> Iterator[None]:
    """Without what torch logs of errors that it raises as well, tracebacks included."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _explain_refusal(error: pickle.UnpicklingError) -> str:
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    if name is None:
        return "is damaged, or holds more than tensors; expected a plain state dictionary"
    return (
        f"holds Python objects other than tensors ({name[1].rstrip('.')}), which could run code; "
        "expected a plain state dictionary"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _named(path: Path, content: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries by their joined names."""
    names: set[str] = set()
    for name, value in _leaves(path, content, "", 0):
        if name in names or len(names) == MAX_NAMES:
            what = "twice" if name in names else f"and {MAX_NAMES} more"
            raise RequestError(f"{path} is damaged: it has the entry {name} {what}")
        names.add(name)
        yield name, value


def _leaves(
    path: Path, content: dict[Any, Any], prefix: str, depth: int
) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise RequestError(f"{path} is damaged: its dictionaries are nested too deeply")
    for key, value in content.items():
        if not isinstance(key, str | int):
            raise RequestError(f"{path} is damaged: it has a name of type {type(key).__name__}")
        if isinstance(value, dict):
            yield from _leaves(path, value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _locate(path: Path, name: str, value: Any, records: dict[int, int]) -> Located | str:
    import torch

    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.layout != torch.strided or not value.is_contiguous():
        raise RequestError(
            f"{path}: tensor {name} {list(value.shape)} is not stored row by row; "
            "save it again after .contiguous()"
        )
    start = _storage_offset(value)
    skip = int(value.storage_offset()) * value.element_size()
    nbytes = math.prod(value.shape) * value.element_size()
    whole = value.untyped_storage().nbytes()
    if records.get(start, -1) != whole or skip + nbytes > whole:
        raise RequestError(
            f"{path}: tensor {name} does not lie in a record of the file (or torch "
            f"{torch.__version__} no longer tells where); expected {nbytes} bytes at {start + skip}"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    return Located(path, dtype, tuple(value.shape), start + skip)


def _storage_offset(tensor: "torch.Tensor") -> int:
    """Where in the file the tensor's storage starts; -1 if torch does not tell."""
    return int(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1)
