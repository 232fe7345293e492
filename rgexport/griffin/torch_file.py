"""Reads where the tensors of a `torch.save` file lie, without loading or running anything.

torch parses the pickle (`weights_only=True`, so that no code runs) under fake tensors, which
note the file offset of each storage in the private `_checkpoint_offset`. It is checked against
the offsets in the zip directory, so that a change in torch cannot make us read wrong bytes.
"""

import io
import logging
import math
import mmap
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.tensor import DTYPES
from rgexport.griffin.torch_zip import TorchZip, first_line, open_zip, other_objects

if TYPE_CHECKING:
    import torch

MAX_NAMES, MAX_DEPTH = 1 << 16, 16
"""Of the dictionaries in a file: far above what a model needs. A few nested ones that hold one
another twice would have more names than fit into any memory."""


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
    archive = open_zip(path)
    content = _load(path)
    _check_storages(path, archive)
    if not isinstance(content, dict):
        raise RequestError(
            f"{path} holds {type(content).__name__}; expected a dictionary of tensors"
        )
    sizes = dict(archive.storages.values())
    return {name: _locate(path, name, value, sizes) for name, value in _named(path, content)}


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
        raise RequestError(f"{path} is damaged: {first_line(error)}") from None


def _check_storages(path: Path, archive: TorchZip) -> None:
    """Has torch read its pickle again, with storages that are parts of the mapped file.

    torch demands that a storage has the size of its record and that tensors lie in it, but does not
    look under fake tensors: a fake storage that is stated as too small grows with its tensor.

    Raises:
        RequestError: a storage of another size, or a tensor that does not lie in one.
    """
    import torch

    try:
        from torch._weights_only_unpickler import Unpickler
    except ImportError:
        raise RequestError(
            f"torch {torch.__version__} no longer lets {path.name} be checked; convert it to "
            "safetensors, or install an earlier torch"
        ) from None

    def storage(stated: Any) -> torch.TypedStorage:
        _, kind, key, _, count = stated
        name, dtype = f"{archive.folder}/data/{key}", getattr(kind, "dtype", torch.uint8)
        offset, size = archive.storages.get(name, (0, 0))
        if count * dtype.itemsize != size:
            raise RequestError(
                f"{path} is damaged: its record {name} has {size} bytes; "
                f"expected {count * dtype.itemsize}, as its pickle says"
            )
        part = mapped[offset : offset + size]
        return torch.TypedStorage(wrap_storage=part, dtype=dtype, _internal=True)

    with path.open("rb") as file:  # not by its name, which torch would have to be able to encode
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
    unpickler = Unpickler(io.BytesIO(archive.pickle), encoding="utf-8")
    unpickler.persistent_load = storage  # type: ignore[method-assign]
    try:
        unpickler.load()
    except RequestError:
        raise
    except Exception as error:  # as of torch.load
        raise RequestError(f"{path} is damaged: {first_line(error)}") from None


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
    return other_objects(name[1].rstrip("."))


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


def _locate(path: Path, name: str, value: Any, sizes: dict[int, int]) -> Located | str:
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
    if sizes.get(start, -1) != whole or skip + nbytes > whole:
        raise RequestError(
            f"{path}: tensor {name} does not lie in a record of the file (or torch "
            f"{torch.__version__} no longer tells where); expected {nbytes} bytes at {start + skip}"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    return Located(path, dtype, tuple(value.shape), start + skip)


def _storage_offset(tensor: "torch.Tensor") -> int:
    """Where in the file the tensor's storage starts; -1 if torch does not tell."""
    return int(getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1)
