"""Describes any Core ML package: as JSON, and as tables for the terminal."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rgexport.artifacts.coreml.mil.checks import CONFIG, OPERATIONS, check_without_manifest
from rgexport.artifacts.coreml.mil.package import (
    PACKAGE_SUFFIX,
    Package,
    file_values,
    open_package,
)
from rgexport.artifacts.coreml.mil.program import FileValue, Function, TensorType
from rgexport.reporting.tables import Row, Table
from rgexport.units import amount

_SYSTEMS = {
    6: "iOS 15",
    7: "iOS 16",
    8: "iOS 17",
    9: "iOS 18",
    10: "iOS 26",
}
"""Version of a model's specification → the first system that can load it."""

_Object = dict[str, Any]
"""A JSON object."""

_GROUPS = ("inputs", "outputs", "states")
_MAX_CHARACTERS = 60  # of a text of the metadata
_MAX_PROBLEMS = 20  # that are listed
_NUMBER = re.compile(r"(?<=_)\d+(?=_)")
"""The number of a layer in a name; rows that differ only there are merged."""


# ---- As JSON ----------------------------------------------------------------------------------


def describe_package(path: Path) -> _Object:
    """Returns the description of a package as plain JSON.

    All hashes of a package that rgexport made are checked, and its `problems` listed. Raises
    RequestError if the package cannot be read.
    """
    package = open_package(path)
    is_ours = CONFIG in package.description.metadata.userDefined

    files = _describe_files(path)
    size = sum(record["size"] for record in files.values())

    functions = {}
    operation_types: set[str] = set()
    for name, function in package.functions.items():
        functions[name] = _describe_function(function, package)
        operation_types |= functions[name]["operations"].keys()

    problems: list[str] = []
    if is_ours:
        problems.extend(check_without_manifest(package))

    weights = file_values(package.functions.values())
    return {
        "kind": "mlpackage",
        "name": path.resolve().name.removesuffix(PACKAGE_SUFFIX),
        "path": str(path),
        "specification_version": package.specification_version,
        "default_function": package.default_function,
        "size": size,
        "made_by_rgexport": is_ours,
        "all_hashes_verified": is_ours,
        "metadata": _describe_metadata(package),
        "functions": functions,
        "weights": _describe_weights(weights),
        "unchecked": sorted(operation_types - OPERATIONS),
        "problems": problems,
        "files": files,
    }


def _describe_files(folder: Path) -> dict[str, dict[str, int]]:
    """Returns the size of each file in a folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size}
    return files


def _describe_metadata(package: Package) -> dict[str, str]:
    metadata = package.description.metadata
    fields = {
        "summary": metadata.shortDescription,
        "author": metadata.author,
        "license": metadata.license,
        "version": metadata.versionString,
    }
    user_defined = sorted(metadata.userDefined.items())
    fields.update(user_defined)
    return fields


def _describe_function(function: Function, package: Package) -> _Object:
    types = _value_types(function)
    helps = _feature_helps(function, package)
    description: _Object = {}
    for group in _GROUPS:
        values = []
        for name in getattr(function, group):
            value = _describe_value(name, types.get(name), helps.get(name, ""))
            values.append(value)
        description[group] = values

    counts = Counter(operation.type for operation in function.walk())
    description["operations"] = dict(counts.most_common())
    return description


def _value_types(function: Function) -> dict[str, TensorType]:
    """Returns the types of the function's inputs, states and computed values."""
    types: dict[str, TensorType] = {}
    for operation in function.operations:
        types.update(operation.outputs)
    types.update(function.inputs)
    types.update(function.states)
    return types


def _feature_helps(function: Function, package: Package) -> dict[str, str]:
    """Returns the help text of each input, output and state of a function."""
    features = package.description  # a model with one function has its features directly in here
    for message in package.description.functions:
        if message.name == function.name:
            features = message

    helps = {}
    for feature in (*features.input, *features.output, *features.state):
        helps[feature.name] = feature.shortDescription
    return helps


def _describe_value(name: str, kind: TensorType | None, help_text: str) -> _Object:
    value: _Object = {"name": name}
    if kind is not None:
        value["dtype"] = kind.dtype
        value["shape"] = list(kind.shape)
    value["help"] = help_text
    return value


def _describe_weights(values: Iterable[FileValue]) -> list[_Object]:
    """Returns the number of blobs, elements and bytes in weight files, by dtype.

    Functions share blobs; each counts once.
    """
    blob_types = {}
    for value in values:
        blob_types[value.file, value.offset] = value.type

    totals: dict[str, Counter[str]] = {}
    for kind in blob_types.values():
        total = totals.setdefault(kind.dtype, Counter())
        total["blobs"] += 1
        total["items"] += kind.size
        total["bytes"] += kind.nbytes

    return [{"dtype": dtype, **totals[dtype]} for dtype in sorted(totals)]


# ---- As text ----------------------------------------------------------------------------------


def package_text(description: _Object) -> Iterator[str | Table]:
    """Yields the lines and tables that present a description of `describe_package`."""
    yield _title(description)
    yield _metadata_table(description["metadata"])
    yield _values_table(description["functions"])
    yield _operations_table(description["functions"])
    yield _weights_table(description["weights"])
    yield _files_table(description["files"])
    yield _closing(description)


def _title(description: _Object) -> str:
    name = description["name"]
    version = description["specification_version"]
    functions = ", ".join(description["functions"])
    default = description["default_function"]

    specification = f"specification {version}"
    if version in _SYSTEMS:
        specification += f" ({_SYSTEMS[version]} or later)"

    facts = (
        f"{name}: Core ML package",
        specification,
        f"functions {functions} (by default {default})",
        amount(description["size"]),
    )
    return ", ".join(facts) + f"\n{description['path']}\n"


def _metadata_table(metadata: dict[str, str]) -> Table:
    rows = []
    for name, value in metadata.items():
        text = " ".join(value.split())
        if len(text) > _MAX_CHARACTERS:
            text = f"{text[: _MAX_CHARACTERS - 3]}..."
        if text:
            rows.append((name, text))
    return Table("Metadata", ("", ""), rows)


def _values_table(functions: _Object) -> Table:
    header = ("function", "", "name", "dtype", "shape")
    rows: list[Row] = []
    for function_name, function in functions.items():
        for group in _GROUPS:
            label = group.removesuffix("s")
            values = _grouped_rows(function[group])
            rows.extend((function_name, label, *value) for value in values)
    return Table("Inputs, outputs and states", header, rows)


def _grouped_rows(values: Iterable[_Object]) -> Iterator[Row]:
    """Yields name, dtype and shape of values; one row for those that differ only in the layer."""
    counts: Counter[Row] = Counter()
    for value in values:
        name = _NUMBER.sub("*", value["name"])
        dtype = value.get("dtype", "?")
        shape = value.get("shape", ())
        shape_text = " x ".join(map(str, shape))
        counts[name, dtype, shape_text] += 1

    for (name, dtype, shape_text), count in counts.items():
        if count > 1:
            name = f"{name} ({count})"
        yield (name, dtype, shape_text)


def _operations_table(functions: _Object) -> Table:
    names = tuple(functions)
    operation_types: set[str] = set()
    for function in functions.values():
        operation_types.update(function["operations"])

    rows = []
    for operation_type in sorted(operation_types):
        row = [operation_type]
        for function in functions.values():
            count = function["operations"].get(operation_type, 0)
            row.append(f"{count:,}")
        rows.append(tuple(row))
    return Table("Operations", ("type", *names), rows, names)


def _weights_table(weights: list[_Object]) -> Table:
    numbers = ("blobs", "items", "size")
    rows = []
    for total in weights:
        row = (
            total["dtype"],
            f"{total['blobs']:,}",
            f"{total['items']:,}",
            amount(total["bytes"]),
        )
        rows.append(row)
    return Table("Weights", ("dtype", *numbers), rows, numbers)


def _files_table(files: dict[str, dict[str, int]]) -> Table:
    rows = []
    for name, record in files.items():
        size = amount(record["size"])
        rows.append((name, size))
    return Table("Files", ("name", "size"), rows, ("size",))


def _closing(description: _Object) -> str:
    """Returns the problems, or a sentence that says how far the package was checked."""
    problems = description["problems"]
    if problems:
        lines = [f"Problem: {problem}" for problem in problems[:_MAX_PROBLEMS]]
        hidden = len(problems) - _MAX_PROBLEMS
        if hidden > 0:
            lines.append(f"and {hidden} more problems")
        return "\n".join(lines)

    if description["made_by_rgexport"]:
        return "No problems."

    text = "Not made by rgexport: it can be read and has all weights; nothing else was checked."
    if description["unchecked"]:
        unknown = ", ".join(description["unchecked"])
        text += f" rgexport cannot run these operations: {unknown}."
    return text
