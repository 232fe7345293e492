"""Opens a `.mlpackage`: a folder with a manifest, a model file and weight files."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf.message import DecodeError

from rgexport.errors import RequestError, one_line
from rgexport.export.mil import decoder
from rgexport.export.mil.blob import Blob, BlobFile
from rgexport.export.mil.messages import messages
from rgexport.export.mil.program import FileValue, Function
from rgexport.files.paths import read_regular, stays_inside
from rgexport.files.typed_json import read_json

_MANIFEST, _DATA = "Manifest.json", "Data"
PACKAGE_SUFFIX = ".mlpackage"
_MAIN = "main"
"""What the only function of a model is called."""
_MODEL_PATH = "@model_path/"
"""A program's word for the folder of its model file."""
MAX_MODEL_BYTES = 512 << 20
"""Far above the size of any program, since weights have their own files."""


@dataclass(frozen=True, eq=False)
class Package:
    """An opened package: the program is in memory, the weights are not."""

    path: Path
    model: Path
    """The model file."""
    specification_version: int
    functions: dict[str, Function]
    default_function: str
    description: Any
    """The message `ModelDescription`: metadata, and help for each input, output and state."""
    blob_files: Mapping[str, BlobFile]
    """By their names in the program."""

    def blob(self, value: FileValue) -> Blob:
        """The stored bytes of a value.

        Raises:
            RequestError: the header of the blob does not agree with the program.
        """
        return self.blob_files[value.file].blob(value.offset, value.type)


def means_package(path: Path) -> bool:
    """Whether a path names a package, by its suffix or as a folder with a package's manifest."""
    if path.suffix == PACKAGE_SUFFIX:
        return not path.is_file()
    return (path / _MANIFEST).is_file() and (path / _DATA).is_dir()


def open_package(path: Path | str) -> Package:
    """Reads the program and the headers of its weights.

    Raises:
        RequestError: no package, a file that is missing or outside of it, a program that
            contradicts itself, or a weight that is not in its file.
    """
    folder = Path(path)
    model = _model_file(folder)
    message = _parse(model)
    try:
        functions = decoder.functions(message.mlProgram)
    except decoder.Damaged as error:
        raise RequestError(f"{model} is damaged: {one_line(str(error))}") from None
    if not functions:
        raise RequestError(f"{model} holds no ML program; expected a model of iOS 15 or later")
    default = message.description.defaultFunctionName
    default = default or (_MAIN if _MAIN in functions else next(iter(functions)))
    if default not in functions:
        raise RequestError(f"{model} is damaged: it has no function {default!r}, its default")
    values = file_values(functions.values())
    names = sorted({value.file for value in values})
    package = Package(
        path=folder,
        model=model,
        specification_version=message.specificationVersion,
        functions=functions,
        default_function=default,
        description=message.description,
        blob_files={name: BlobFile.open(_weight_file(folder, model, name)) for name in names},
    )
    _require_weights(package, values)
    return package


def file_values(functions: Iterable[Function]) -> set[FileValue]:
    """All values in weight files."""
    constants = (c for f in functions for op in f.walk() for _, c in op.constants)
    return {constant for constant in constants if isinstance(constant, FileValue)}


def _require_weights(package: Package, values: set[FileValue]) -> None:
    """Refuses headers that do not agree with the program, and weights that overlap."""
    sizes: dict[str, dict[int, int]] = {}
    for value in sorted(values, key=lambda value: (value.file, value.offset)):
        package.blob(value)
        sizes.setdefault(value.file, {})[value.offset] = value.type.nbytes
    for name, blobs in sizes.items():
        file = package.blob_files[name]
        if sum(blobs.values()) > file.size:
            raise RequestError(f"{file.path} is damaged: its weights overlap")


def _model_file(folder: Path) -> Path:
    """The model file that the manifest names."""
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


def _weight_file(folder: Path, model: Path, name: str) -> Path:
    if not name.startswith(_MODEL_PATH):
        raise RequestError(
            f"{model} is damaged: it takes weights from {name!r}; expected {_MODEL_PATH}…"
        )
    return _inside(folder, model.parent, name.removeprefix(_MODEL_PATH), model)


def _inside(folder: Path, base: Path, relative: str, source: Path) -> Path:
    """The file `relative` to `base`, which must be in `folder` after links are resolved."""
    path = base / PurePosixPath(relative)
    root = os.path.realpath(folder)
    if not stays_inside(relative) or os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise RequestError(f"{source} is damaged: {relative!r} leads out of {folder}")
    try:
        there = path.is_file()
    except OSError:  # the name is too long
        there = False
    if not there:
        raise RequestError(f"{folder} is damaged: {path.relative_to(folder)} is missing")
    return path


def _parse(path: Path) -> Any:
    try:
        content = read_regular(path, MAX_MODEL_BYTES)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return messages("Model").Model.FromString(content)
    except DecodeError:
        raise RequestError(f"{path} is damaged: it is no protobuf message of a model") from None
