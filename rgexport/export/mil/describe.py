"""What `rgexport inspect` tells about a Core ML package by itself, whoever made it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rgexport.export.mil.bare import check_bare, is_ours
from rgexport.export.mil.inference import OPERATIONS
from rgexport.export.mil.package import Package, open_package
from rgexport.export.mil.program import FileValue, Function, TensorType
from rgexport.export.mil.typing_checks import CONST
from rgexport.progress import amount
from rgexport.tables import Row, Table

KIND = "mlpackage"
_SYSTEMS = {6: "iOS 15", 7: "iOS 16", 8: "iOS 17", 9: "iOS 18", 10: "iOS 26"}
"""Specification version → the first system that runs it."""
_SHOWN, _LISTED = 60, 20
"""Characters of the metadata's values, and problems, that a terminal gets to see."""
_NUMBER = re.compile(r"(?<=_)\d+(?=_)")


def describe_package(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Plain JSON about a package, with all that is wrong under `problems`.

    Raises:
        RequestError: it cannot be read at all.
    """
    package = open_package(path)
    description = package.description
    files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    sizes = {name: {"size": file.stat().st_size} for name, file in files.items()}
    return {
        "kind": KIND,
        "name": path.resolve().stem,
        "path": str(path),
        "specification_version": package.specification_version,
        "default_function": package.default_function,
        "size": sum(record["size"] for record in sizes.values()),
        "made_by_rgexport": is_ours(package),
        "all_hashes_verified": verify,
        "metadata": {
            "summary": description.summary,
            "author": description.author,
            "license": description.license,
            "version": description.version,
            **description.user_defined,
        },
        "functions": {
            name: _function(function, package) for name, function in package.functions.items()
        },
        "weights": _weights(package),
        "unchecked": sorted(_kinds(package) - OPERATIONS - {CONST}),
        "problems": check_bare(package, verify=verify),
        "files": sizes,
    }


def _function(function: Function, package: Package) -> dict[str, Any]:
    kinds = {name: kind for op in function.operations for name, kind in op.outputs}
    kinds |= function.inputs | function.states
    helps = _helps(function.name, package)
    groups = {
        "inputs": function.inputs,
        "outputs": function.outputs,
        "states": function.states,
    }
    return {
        **{
            group: [_value(name, kinds.get(name), helps.get(name, "")) for name in names]
            for group, names in groups.items()
        },
        "operations": dict(Counter(op.type for op in function.walk()).most_common()),
    }


def _helps(function: str, package: Package) -> dict[str, str]:
    interface = package.description.interfaces.get(function)
    groups = (interface.inputs, interface.outputs, interface.states) if interface else ()
    return {feature.name: feature.help for group in groups for feature in group}


def _value(name: str, kind: TensorType | None, text: str) -> dict[str, Any]:
    given = {"dtype": kind.dtype, "shape": list(kind.shape)} if kind else {}
    return {"name": name, **given, "help": text}


def _kinds(package: Package) -> set[str]:
    return {op.type for function in package.functions.values() for op in function.walk()}


def _weights(package: Package) -> list[dict[str, Any]]:
    """What lies in the weight files, each blob once, by dtype."""
    constants = (
        value
        for function in package.functions.values()
        for operation in function.walk()
        for _, value in operation.constants
    )
    blobs = {(v.file, v.offset): v.type for v in constants if isinstance(v, FileValue)}
    totals: dict[str, Counter[str]] = {}
    for kind in blobs.values():
        total = totals.setdefault(kind.dtype, Counter())
        total.update(blobs=1, items=kind.size, bytes=kind.nbytes)
    return [{"dtype": dtype, **total} for dtype, total in sorted(totals.items())]


def package_parts(d: dict[str, Any]) -> Iterator[str | Table]:
    """The description as text and tables."""
    yield _headline(d)
    yield Table("Metadata", ("", ""), _metadata_rows(d["metadata"]))
    header = ("function", "", "name", "dtype", "shape")
    yield Table("Inputs, outputs and states", header, _value_rows(d["functions"]))
    names = tuple(d["functions"])
    yield Table("Operations", ("type", *names), _operation_rows(d["functions"]), names)
    numbers = ("blobs", "items", "size")
    yield Table("Weights", ("dtype", *numbers), map(_weight_row, d["weights"]), numbers)
    rows = ((name, amount(record["size"])) for name, record in d["files"].items())
    yield Table("Files", ("name", "size"), rows, ("size",))
    yield _closing(d)


def _headline(d: dict[str, Any]) -> str:
    version = d["specification_version"]
    system = _SYSTEMS.get(version)
    facts = (
        f"{d['name']}: Core ML package",
        f"specification {version}" + (f" ({system} or later)" if system else ""),
        f"functions {', '.join(d['functions'])} (by default {d['default_function']})",
        amount(d["size"]),
    )
    return ", ".join(facts) + f"\n{d['path']}\n"


def _closing(d: dict[str, Any]) -> str:
    if problems := d["problems"]:
        lines = [f"Problem: {problem}" for problem in problems[:_LISTED]]
        more = [f"and {len(problems) - _LISTED} more problems"] * (len(problems) > _LISTED)
        return "\n".join(lines + more)
    unchecked = ", ".join(d["unchecked"])
    left = f" What these operations give was believed: {unchecked}." if unchecked else ""
    return f"No problems.{left}"


def _metadata_rows(metadata: dict[str, str]) -> Iterator[Row]:
    for name, value in metadata.items():
        text = " ".join(value.split())
        if text:
            yield name, text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _value_rows(functions: dict[str, Any]) -> Iterator[Row]:
    for name, function in functions.items():
        for group in ("inputs", "outputs", "states"):
            for row in _alike(function[group]):
                yield (name, group.removesuffix("s"), *row)


def _alike(values: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """One row for values that differ in nothing but numbers in their names."""
    rows: Counter[Row] = Counter()
    for value in values:
        shape = " x ".join(map(str, value.get("shape", ())))
        rows[_NUMBER.sub("*", value["name"]), value.get("dtype", "?"), shape] += 1
    for (name, *kind), count in rows.items():
        yield (f"{name} ({count})" if count > 1 else name, *kind)


def _operation_rows(functions: dict[str, Any]) -> Iterator[Row]:
    counts = [function["operations"] for function in functions.values()]
    for kind in sorted({kind for count in counts for kind in count}):
        yield (kind, *(f"{count.get(kind, 0):,}" for count in counts))


def _weight_row(share: dict[str, Any]) -> Row:
    return share["dtype"], f"{share['blobs']:,}", f"{share['items']:,}", amount(share["bytes"])
