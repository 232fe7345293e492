"""Reads where the tensors of a `torch.save` file lie, without loading or running anything.

torch parses the pickle (`weights_only=True`, so that no code runs) under fake tensors, which
note the file offset of each storage in the private `_checkpoint_offset`. It is checked against
the offsets in the zip directory, so that a change in torch cannot make us read wrong bytes.
"""

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
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
    return {name: _locate(path, name, value, records) for name, value in _flatten(content)}


def _records(path: Path) -> dict[int, int]:
    """Offset → size of the storages in the zip archive."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise _not_zip(path)
            with zipfile.ZipFile(file) as archive:
                storages = [i for i in archive.infolist() if _STORAGE.fullmatch(i.filename)]
                return dict(_record(file, info) for info in storages)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile as error:
        raise RequestError(f"{path} is damaged: {error}; copy or download it again") from None


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


def _record(file: Any, info: zipfile.ZipInfo) -> tuple[int, int]:
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"its record {info.filename} is compressed")
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
        with warnings.catch_warnings(), FakeTensorMode():
            warnings.simplefilter("ignore")  # what is odd about the file is told by the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(f"{path} {_explain_refusal(error)}") from None
    except Exception as error:  # torch raises whatever a damaged pickle leads it to
        raise RequestError(f"{path} is damaged: {_first_line(error)}") from None


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


def _flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


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
    if records.get(start, -1) < skip + nbytes:
        raise RequestError(
            f"{path}: tensor {name} does not lie in a record of the file (or torch "
            f"{torch.__version__} no longer tells where); expected {nbytes} bytes at {start + skip}"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    return Located(path, dtype, tuple(value.shape), start + skip)


def _storage_offset(tensor: "torch.Tensor") -> int:
    """Where in the file the tensor's storage starts; -1 if torch does not tell."""
    return int(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1)
