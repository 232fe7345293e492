"""Opens a `.mlpackage`: a folder with a manifest, a model file and weight files.

Weight files are MIL's blob format, version 2, little-endian, with headers of 64 bytes. The file's:
number of blobs u32, version u32; each blob's: `0xDEADBEEF` u32, dtype u32, size in bytes u64,
offset of the data u64. Elements of fewer than 8 bits are packed, the lowest bits first.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from rgexport.artifacts.coreml.mil import program
from rgexport.errors import RequestError, one_line
from rgexport.files.paths import read_regular, report_os_errors, stays_inside
from rgexport.files.typed_json import read_json
from rgexport.griffin.tensor import read_lines

PACKAGE_SUFFIX = ".mlpackage"
MAX_MODEL_BYTES = 512 << 20
HEADER_BYTES = 64  # size of a weight file's header, and of each blob's
_MANIFEST, _DATA = "Manifest.json", "Data"
_MODEL_PATH = "@model_path/"  # a program's name for the folder of its model file
_SENTINEL, _VERSION = 0xDEADBEEF, 2
_FILE, _BLOB = struct.Struct("<4xI"), struct.Struct("<IIQQ")
_BLOB_TYPES = {
    **{"float16": 1, "float32": 2, "uint8": 3, "int8": 4, "bfloat16": 5, "int16": 6, "uint16": 7},
    **{"int4": 8, "uint1": 9, "uint2": 10, "uint4": 11, "uint3": 12, "uint6": 13, "int32": 14},
    **{"uint32": 15, "float8e4m3fn": 16, "float8e5m2": 17},
}


@dataclass(frozen=True)
class Blob:
    path: Path
    offset: int

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((1, stop - start), np.uint8)
        read_lines(self.path, self.offset + start, 0, out)
        return out[0]


@dataclass(frozen=True)
class BlobFile:
    path: Path
    size: int

    @classmethod
    def open(cls, path: Path) -> "BlobFile":
        with report_os_errors(path):
            with path.open("rb") as file:
                head = file.read(HEADER_BYTES)
            size = path.stat().st_size
        if len(head) < HEADER_BYTES or _FILE.unpack_from(head) != (_VERSION,):
            raise RequestError(f"{path} is damaged, or no file of weights of version {_VERSION}")
        return cls(path, size)

    def blob(self, offset: int, type: program.TensorType) -> Blob:
        data_offset = offset + HEADER_BYTES
        if not 0 < offset <= self.size - HEADER_BYTES - type.nbytes:
            raise RequestError(
                f"{self.path} is truncated or damaged: it has {self.size} bytes; expected "
                f"{type.nbytes} bytes of a weight at {data_offset}"
            )
        header = np.empty((1, HEADER_BYTES), np.uint8)
        read_lines(self.path, offset, 0, header)
        expected = _SENTINEL, _BLOB_TYPES.get(type.dtype), type.nbytes, data_offset
        if _BLOB.unpack_from(header.tobytes()) != expected:
            raise RequestError(
                f"{self.path} is damaged: there is no header at {offset} of {type.nbytes} bytes of "
                f"{type.dtype}, which the program needs"
            )
        return Blob(self.path, data_offset)


@dataclass(frozen=True, eq=False)
class Package:
    path: Path
    model: Path
    specification_version: int
    functions: dict[str, program.Function]
    default_function: str
    description: Any
    """The message `ModelDescription`: metadata, and help for each input, output and state."""
    blob_files: Mapping[str, BlobFile]

    def blob(self, value: program.FileValue) -> Blob:
        return self.blob_files[value.file].blob(value.offset, value.type)


def means_package(path: Path) -> bool:
    """Whether a path names a package, by its suffix or as a folder with a package's manifest."""
    if path.suffix == PACKAGE_SUFFIX:
        return not path.is_file()
    return (path / _MANIFEST).is_file() and (path / _DATA).is_dir()


def open_package(path: Path | str) -> Package:
    """Reads the program and the headers of its weights; RequestError if they do not fit."""
    folder = Path(path)
    model = _model_file(folder)
    try:
        with report_os_errors(model):
            message = program.messages("Model").Model.FromString(
                read_regular(model, MAX_MODEL_BYTES)
            )
    except DecodeError:
        raise RequestError(f"{model} is damaged: it is no protobuf message of a model") from None
    try:
        functions = program.decode_functions(message.mlProgram)
    except program.Damaged as error:
        raise RequestError(f"{model} is damaged: {one_line(str(error))}") from None
    if not functions:
        raise RequestError(f"{model} holds no ML program; expected a model of iOS 15 or later")
    default = message.description.defaultFunctionName
    default = default or ("main" if "main" in functions else next(iter(functions)))
    if default not in functions:
        raise RequestError(f"{model} is damaged: it has no function {default!r}, its default")
    values = file_values(functions.values())
    blob_files = {}
    for name in sorted({value.file for value in values}):
        if not name.startswith(_MODEL_PATH):
            raise RequestError(
                f"{model} is damaged: it takes weights from {name!r}; expected {_MODEL_PATH}…"
            )
        path_in_model = name.removeprefix(_MODEL_PATH)
        blob_files[name] = BlobFile.open(_inside(folder, model.parent, path_in_model, model))
    version, description = message.specificationVersion, message.description
    package = Package(folder, model, version, functions, default, description, blob_files)
    sizes: dict[str, dict[int, int]] = {}
    for value in sorted(values, key=lambda value: (value.file, value.offset)):
        package.blob(value)
        sizes.setdefault(value.file, {})[value.offset] = value.type.nbytes
    for name, blobs in sizes.items():
        file = package.blob_files[name]
        if sum(blobs.values()) > file.size:
            raise RequestError(f"{file.path} is damaged: its weights overlap")
    return package


def file_values(functions: Iterable[program.Function]) -> set[program.FileValue]:
    constants = (c for f in functions for op in f.walk() for _, c in op.constants)
    return {constant for constant in constants if isinstance(constant, program.FileValue)}


def _model_file(folder: Path) -> Path:
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        missing = f"it has no {_MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise RequestError(f"{folder} is not a Core ML package: {missing}")
    fields = read_json(manifest)
    items, root = fields.get("itemInfoEntries"), fields.get("rootModelIdentifier")
    item = items.get(root) if isinstance(items, dict) and isinstance(root, str) else None
    relative = item.get("path") if isinstance(item, dict) else None
    if not isinstance(relative, str):
        raise RequestError(f"{manifest} is damaged: it does not say where the model is")
    return _inside(folder, folder / _DATA, relative, manifest)


def _inside(folder: Path, base: Path, relative: str, source: Path) -> Path:
    """Returns the file `relative` to `base`, which must be in `folder` after links are resolved."""
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
