"""Describes a Core ML package without a manifest, from any tool, for `rgexport inspect`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rgexport.export.mil.checks import check_without_manifest, made_by_rgexport
from rgexport.export.mil.package import PACKAGE_SUFFIX, Package, file_values, open_package
from rgexport.export.mil.program import Function
from rgexport.reporting.tables import Row, Table
from rgexport.units import amount

KIND = "mlpackage"
OPERATIONS = frozenset(
    (
        "add cast concat const constexpr_blockwise_shift_scale constexpr_lut_to_dense cos equal "
        "exp gather gelu greater_equal less_equal linear logical_and matmul mul read_state "
        "reduce_mean reduce_sum reshape rsqrt select sigmoid sin slice_by_index softmax sqrt sub "
        "tanh transpose write_state"
    ).split()
)
"""All that rgexport emits and its interpreter executes."""
_SYSTEMS = {6: "iOS 15", 7: "iOS 16", 8: "iOS 17", 9: "iOS 18", 10: "iOS 26"}
"""Specification version → the first system that runs it."""
_SHOWN, _LISTED = 60, 20
_NUMBER = re.compile(r"(?<=_)\d+(?=_)")


def describe_package(path: Path) -> dict[str, Any]:
    """Describes a package as JSON; one of ours is hashed, and `problems` lists what is wrong."""
    package = open_package(path)
    ours, metadata = made_by_rgexport(package), package.description.metadata
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    kinds = {op.type for function in package.functions.values() for op in function.walk()}
    return {
        "kind": KIND,
        "name": path.resolve().name.removesuffix(PACKAGE_SUFFIX),
        "path": str(path),
        "specification_version": package.specification_version,
        "default_function": package.default_function,
        "size": sum(sizes.values()),
        "made_by_rgexport": ours,
        "all_hashes_verified": ours,
        "metadata": {
            "summary": metadata.shortDescription,
            "author": metadata.author,
            "license": metadata.license,
            "version": metadata.versionString,
            **dict(sorted(metadata.userDefined.items())),
        },
        "functions": {
            name: _function(function, package) for name, function in package.functions.items()
        },
        "weights": _weights(package),
        "unchecked": sorted(kinds - OPERATIONS),
        "problems": list(check_without_manifest(package)) if ours else [],
        "files": {name: {"size": size} for name, size in sizes.items()},
    }


def _function(function: Function, package: Package) -> dict[str, Any]:
    types = {name: kind for op in function.operations for name, kind in op.outputs}
    types |= function.inputs | function.states
    # A model of a single function has its features beside the list of functions.
    described = {message.name: message for message in package.description.functions}
    features = described.get(function.name, package.description)
    helps = {
        feature.name: feature.shortDescription
        for group in (features.input, features.output, features.state)
        for feature in group
    }

    def value(name: str) -> dict[str, Any]:
        kind = types.get(name)
        form = {"dtype": kind.dtype, "shape": list(kind.shape)} if kind else {}
        return {"name": name, **form, "help": helps.get(name, "")}

    return {
        "inputs": list(map(value, function.inputs)),
        "outputs": list(map(value, function.outputs)),
        "states": list(map(value, function.states)),
        "operations": dict(Counter(op.type for op in function.walk()).most_common()),
    }


def _weights(package: Package) -> list[dict[str, Any]]:
    values = file_values(package.functions.values())
    blobs = {(value.file, value.offset): value.type for value in values}
    totals: dict[str, Counter[str]] = {}
    for kind in blobs.values():
        total = totals.setdefault(kind.dtype, Counter())
        total.update(blobs=1, items=kind.size, bytes=kind.nbytes)
    return [{"dtype": dtype, **total} for dtype, total in sorted(totals.items())]


def package_text(d: dict[str, Any]) -> Iterator[str | Table]:
    yield _headline(d)
    texts = {name: " ".join(value.split()) for name, value in d["metadata"].items()}
    metadata = (
        (name, text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
        for name, text in texts.items()
        if text
    )
    yield Table("Metadata", ("", ""), metadata)
    header = ("function", "", "name", "dtype", "shape")
    values = (
        (name, group.removesuffix("s"), *row)
        for name, function in d["functions"].items()
        for group in ("inputs", "outputs", "states")
        for row in _grouped_rows(function[group])
    )
    yield Table("Inputs, outputs and states", header, values)
    names = tuple(d["functions"])
    counts = [function["operations"] for function in d["functions"].values()]
    operations = (
        (kind, *(f"{count.get(kind, 0):,}" for count in counts))
        for kind in sorted({kind for count in counts for kind in count})
    )
    yield Table("Operations", ("type", *names), operations, names)
    numbers = ("blobs", "items", "size")
    weights = (
        (w["dtype"], f"{w['blobs']:,}", f"{w['items']:,}", amount(w["bytes"])) for w in d["weights"]
    )
    yield Table("Weights", ("dtype", *numbers), weights, numbers)
    files = ((name, amount(record["size"])) for name, record in d["files"].items())
    yield Table("Files", ("name", "size"), files, ("size",))
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
        if len(problems) > _LISTED:
            lines.append(f"and {len(problems) - _LISTED} more problems")
        return "\n".join(lines)
    if d["made_by_rgexport"]:
        return "No problems."
    unknown = ", ".join(d["unchecked"])
    return "Not made by rgexport: it can be read and has all weights; nothing else was checked." + (
        f" rgexport cannot run these operations: {unknown}." if unknown else ""
    )


def _grouped_rows(values: Iterable[dict[str, Any]]) -> Iterator[Row]:
    rows: Counter[Row] = Counter()
    for value in values:
        shape = " x ".join(map(str, value.get("shape", ())))
        rows[_NUMBER.sub("*", value["name"]), value.get("dtype", "?"), shape] += 1
    for (name, *kind), count in rows.items():
        yield (f"{name} ({count})" if count > 1 else name, *kind)
