"""Opens a `.mlpackage`: a folder with a manifest, a model file and weight files.

Weight files are MIL's blob format, version 2, little-endian, with headers of 64 bytes. The header
of the file: number of blobs u32, version u32. The header of each blob: `0xDEADBEEF` u32, dtype
u32, size in bytes u64, offset of the data u64. Elements of fewer than 8 bits are packed, the
lowest bits first.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from rgexport.artifacts.coreml.mil.decoding import Damaged, decode_functions
from rgexport.artifacts.coreml.mil.messages import messages
from rgexport.artifacts.coreml.mil.program import FileValue, Function, TensorType
from rgexport.errors import RequestError, one_line
from rgexport.files.paths import read_regular, report_os_errors, stays_inside
from rgexport.files.typed_json import read_json
from rgexport.griffin.tensor import read_lines

PACKAGE_SUFFIX = ".mlpackage"
MAX_MODEL_BYTES = 512 << 20
HEADER_BYTES = 64  # size of a weight file's header, and of each blob's

_MANIFEST = "Manifest.json"
_DATA = "Data"
_MODEL_PATH = "@model_path/"  # a program's name for the folder of its model file

_SENTINEL = 0xDEADBEEF
_VERSION = 2
_FILE_HEADER = struct.Struct("<4xI")
_BLOB_HEADER = struct.Struct("<IIQQ")
_BLOB_TYPES = {
    "float16": 1,
    "float32": 2,
    "uint8": 3,
    "int8": 4,
    "bfloat16": 5,
    "int16": 6,
    "uint16": 7,
    "int4": 8,
    "uint1": 9,
    "uint2": 10,
    "uint4": 11,
    "uint3": 12,
    "uint6": 13,
    "int32": 14,
    "uint32": 15,
    "float8e4m3fn": 16,
    "float8e5m2": 17,
}
"""dtype → its number in the header of a blob."""


@dataclass(frozen=True)
class Blob:
    """The data of one constant in a weight file.

    Attributes:
        path: the weight file.
        offset: the offset of the data in the file.
    """

    path: Path
    offset: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the bytes `start` to `stop` of the data as uint8."""
        lines = np.empty((1, stop - start), np.uint8)
        read_lines(self.path, self.offset + start, 0, lines)
        return lines[0]


@dataclass(frozen=True)
class BlobFile:
    """A weight file with a valid header, and its size in bytes."""

    path: Path
    size: int

    @classmethod
    def open(cls, path: Path) -> "BlobFile":
        """Reads the header of a weight file; raises RequestError if it is not one."""
        with report_os_errors(path):
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
            size = path.stat().st_size

        is_complete = len(header) == HEADER_BYTES
        if not is_complete or _FILE_HEADER.unpack_from(header) != (_VERSION,):
            raise RequestError(f"{path} is damaged, or no file of weights of version {_VERSION}")
        return cls(path, size)

    def blob(self, offset: int, type: TensorType) -> Blob:
        """Returns the blob with its header at `offset`; raises RequestError if it does not fit."""
        data_offset = offset + HEADER_BYTES
        last_offset = self.size - HEADER_BYTES - type.nbytes
        if not 0 < offset <= last_offset:
            raise RequestError(
                f"{self.path} is truncated or damaged: it has {self.size} bytes; expected "
                f"{type.nbytes} bytes of a weight at {data_offset}"
            )

        lines = np.empty((1, HEADER_BYTES), np.uint8)
        read_lines(self.path, offset, 0, lines)
        header = _BLOB_HEADER.unpack_from(lines.tobytes())
        expected = (
            _SENTINEL,
            _BLOB_TYPES.get(type.dtype),
            type.nbytes,
            data_offset,
        )
        if header != expected:
            raise RequestError(
                f"{self.path} is damaged: there is no header at {offset} of {type.nbytes} bytes of "
                f"{type.dtype}, which the program needs"
            )
        return Blob(self.path, data_offset)


@dataclass(frozen=True, eq=False)
class Package:
    """An opened package: its decoded program, and its weight files.

    Attributes:
        path: the folder of the package.
        model: the model file in the folder.
        specification_version: the version of the model's specification.
        functions: the functions of the program, by name.
        default_function: the function that runs if none is named.
        description: the message `ModelDescription`: metadata, and help for each input, output and
            state.
        blob_files: the weight files, by the program's names for them.
    """

    path: Path
    model: Path
    specification_version: int
    functions: dict[str, Function]
    default_function: str
    description: Any
    blob_files: Mapping[str, BlobFile]

    def blob(self, value: FileValue) -> Blob:
        """Returns the data of a constant; raises RequestError if its header is not as declared."""
        file = self.blob_files[value.file]
        return file.blob(value.offset, value.type)


def means_package(path: Path) -> bool:
    """Whether a path names a package, by its suffix or as a folder with a package's manifest."""
    if path.suffix == PACKAGE_SUFFIX:
        return not path.is_file()
    return (path / _MANIFEST).is_file() and (path / _DATA).is_dir()


def open_package(path: Path | str) -> Package:
    """Reads the program and the headers of its weights; RequestError if they do not fit."""
    folder = Path(path)
    model = _model_file(folder)
    message = _read_model(model)
    functions = _read_functions(model, message)
    default = _default_function(model, message, functions)
    values = file_values(functions.values())
    package = Package(
        path=folder,
        model=model,
        specification_version=message.specificationVersion,
        functions=functions,
        default_function=default,
        description=message.description,
        blob_files=_open_blob_files(folder, model, values),
    )
    _check_blobs(package, values)
    return package


def file_values(functions: Iterable[Function]) -> set[FileValue]:
    """Returns all constants of functions that are stored in weight files."""
    values = set()
    for function in functions:
        for operation in function.walk():
            for _, constant in operation.constants:
                if isinstance(constant, FileValue):
                    values.add(constant)
    return values


def _model_file(folder: Path) -> Path:
    """Returns the model file that the manifest of a package names."""
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        missing = "there is no such folder"
        if folder.is_dir():
            missing = f"it has no {_MANIFEST}"
        raise RequestError(f"{folder} is not a Core ML package: {missing}")

    relative = _model_path(read_json(manifest))
    if relative is None:
        raise RequestError(f"{manifest} is damaged: it does not say where the model is")
    return _inside(folder, folder / _DATA, relative, manifest)


def _model_path(manifest: Mapping[str, Any]) -> str | None:
    """Returns the path of the manifest's root item; None if a field is missing or of no use."""
    items = manifest.get("itemInfoEntries")
    root = manifest.get("rootModelIdentifier")
    if not isinstance(items, dict) or not isinstance(root, str):
        return None

    item = items.get(root)
    if not isinstance(item, dict):
        return None

    path = item.get("path")
    if not isinstance(path, str):
        return None
    return path


def _inside(folder: Path, base: Path, relative: str, source: Path) -> Path:
    """Returns the file `relative` to `base`, which must be in `folder` after links are resolved.

    `source` is the file that names it.
    """
    path = base / PurePosixPath(relative)
    root = os.path.realpath(folder)
    if not stays_inside(relative) or os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise RequestError(f"{source} is damaged: {relative!r} leads out of {folder}")

    try:
        is_file = path.is_file()
    except OSError:  # the name is too long
        is_file = False
    if not is_file:
        raise RequestError(f"{folder} is damaged: {path.relative_to(folder)} is missing")
    return path


def _read_model(model: Path) -> Any:
    """Returns the message `Model` of a model file."""
    message_type = messages("Model").Model
    try:
        with report_os_errors(model):
            content = read_regular(model, MAX_MODEL_BYTES)
        return message_type.FromString(content)
    except DecodeError:
        raise RequestError(f"{model} is damaged: it is no protobuf message of a model") from None


def _read_functions(model: Path, message: Any) -> dict[str, Function]:
    try:
        functions = decode_functions(message.mlProgram)
    except Damaged as error:
        raise RequestError(f"{model} is damaged: {one_line(str(error))}") from None
    if not functions:
        raise RequestError(f"{model} holds no ML program; expected a model of iOS 15 or later")
    return functions


def _default_function(model: Path, message: Any, functions: dict[str, Function]) -> str:
    """Returns the name that the model states; without one, `main` or the first function."""
    default = str(message.description.defaultFunctionName)
    if not default:
        if "main" in functions:
            return "main"
        return next(iter(functions))
    if default not in functions:
        raise RequestError(f"{model} is damaged: it has no function {default!r}, its default")
    return default


def _open_blob_files(folder: Path, model: Path, values: Iterable[FileValue]) -> dict[str, BlobFile]:
    """Opens the weight files that constants are in, by the program's names for them."""
    blob_files = {}
    for name in sorted({value.file for value in values}):
        if not name.startswith(_MODEL_PATH):
            raise RequestError(
                f"{model} is damaged: it takes weights from {name!r}; expected {_MODEL_PATH}…"
            )
        relative = name.removeprefix(_MODEL_PATH)
        path = _inside(folder, model.parent, relative, model)
        blob_files[name] = BlobFile.open(path)
    return blob_files


def _check_blobs(package: Package, values: Iterable[FileValue]) -> None:
    """Raises RequestError if a blob's header is not as declared, or blobs overlap."""
    sizes: dict[str, dict[int, int]] = {}
    for value in sorted(values, key=lambda value: (value.file, value.offset)):
        package.blob(value)
        sizes_of_file = sizes.setdefault(value.file, {})
        sizes_of_file[value.offset] = value.type.nbytes

    for name, sizes_of_file in sizes.items():
        file = package.blob_files[name]
        if sum(sizes_of_file.values()) > file.size:
            raise RequestError(f"{file.path} is damaged: its weights overlap")
