"""Checks what Core ML would not refuse: lost states, wrong weights; describes any package."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from rgexport.artifacts.coreml.mil import package as packages
from rgexport.artifacts.coreml.mil.program import FileValue, Function, Name
from rgexport.artifacts.manifest import StoredTensor
from rgexport.files.hashing import hash_file
from rgexport.files.typed_json import Mismatch, from_json, parse_json
from rgexport.griffin.layout import site_of
from rgexport.reporting.tables import Row, Table
from rgexport.units import amount

CONFIG, DIGESTS = "rgexport.config", "rgexport.weights"
"""Keys of a package's metadata: the Griffin configuration, and the hash of each stored part."""
_DIGEST_LENGTH = 16  # hexadecimal digits of a SHA-256 in the metadata: enough against mistakes
_SHARED = "embed_tokens"  # the embedding's site; the output head shares its weight
_TOKENS = "position_ids"
"""The input whose last axis is the number of tokens; each function with states has it."""
_LABELS = {
    ("const", "val"): "data",
    ("constexpr_blockwise_shift_scale", "scale"): "scales",
    ("constexpr_blockwise_shift_scale", "offset"): "zero_points",
    ("constexpr_lut_to_dense", "indices"): "data",
}
"""(operation, input) → the part of a stored tensor, where it has another name than the input."""

Location = tuple[Path, int]


def check_package(
    package: packages.Package, uses: Mapping[str, Mapping[str, StoredTensor]]
) -> Iterator[str]:
    """Yields complaints; `uses` has for each function the manifest's weights that it must use."""
    folder = package.path.parent
    for function in package.functions.values():
        tensors = uses.get(function.name, {})
        expected = {
            part_name(tensor, label): (folder / part.file, part.offset)
            for tensor, stored in tensors.items()
            for label, part in stored.parts.items()
        }
        yield from _check_states(function)
        yield from _check_locations(package, function, expected)
        yield from _check_uses(function, tensors)


def check_without_manifest(package: packages.Package) -> Iterator[str]:
    """Yields complaints about weights with another hash than in the metadata, and about states.

    The functions of a segment must use the same weights.
    """
    by_segment: dict[str, dict[str, FileValue]] = {}
    for function in package.functions.values():
        segment = function.name.rpartition("_")[0]
        blobs = by_segment.setdefault(segment, _blobs(function))
        expected = {name: _location(package, blob) for name, blob in blobs.items()}
        yield from _check_states(function)
        yield from _check_locations(package, function, expected)
    weights = {name: blob for blobs in by_segment.values() for name, blob in blobs.items()}
    yield from _check_digests(package, weights)


def part_name(tensor: str, label: str) -> str:
    """Returns `OPERATION.PART`; the operation's name has `_` for dots, and a row group's number."""
    weight, _, part = f"{tensor}.{label}".rpartition(".")
    return f"{weight.replace('.', '_')}.{part}"


def short_digests(blobs: Mapping[str, str]) -> dict[str, str]:
    return {
        part_name(*blob.rsplit(".", 1)): digest[:_DIGEST_LENGTH] for blob, digest in blobs.items()
    }


def _check_states(function: Function) -> Iterator[str]:
    """Complains of states that are not written once, or not computed from their old value.

    A call of as many tokens as a state has slots may replace all of it.
    """
    positions = function.inputs.get(_TOKENS)
    num_tokens = positions.shape[-1] if positions and positions.shape else 1
    bits = {name: 1 << index for index, name in enumerate(function.states)}
    sources: dict[str, int] = {}  # value → a bit for each state that it was computed from
    written: set[str] = set()
    for operation in function.walk():
        operands = [v.name for v in chain(*operation.inputs.values()) if isinstance(v, Name)]
        source_bits = 0
        for name in operands:
            source_bits |= sources.get(name, 0)
        handles = operation.inputs.get("input", ())
        state = handles[0].name if len(handles) == 1 and isinstance(handles[0], Name) else ""
        if operation.type == "read_state" and state in function.states:
            source_bits |= bits[state]
        elif operation.type == "write_state" and state in function.states:
            write = f"{function.name}: {operation.type} {operation.label}"
            shape = function.states[state].shape
            slots = shape[-2] if len(shape) > 1 else 1
            if state in written:
                yield f"{write}: the state {state} is written a second time"
            elif not source_bits & bits[state] and slots > num_tokens:
                yield (
                    f"{write}: the new value of the state {state} does not depend on its old "
                    "value, so the past would be lost"
                )
            written.add(state)
        sources.update((name, source_bits) for name, _ in operation.outputs)
    for state in function.states.keys() - written:
        yield f"{function.name}: state {state} is never written"


def _blobs(function: Function) -> dict[str, FileValue]:
    blobs = {}
    for operation in function.walk():
        name = operation.outputs[0][0] if operation.outputs else operation.name
        for parameter, value in operation.constants:
            if isinstance(value, FileValue):
                blobs[f"{name}.{_LABELS.get((operation.type, parameter), parameter)}"] = value
    return blobs


def _location(package: packages.Package, value: FileValue) -> Location:
    return package.blob_files[value.file].path, value.offset + packages.HEADER_BYTES


def _check_locations(
    package: packages.Package, function: Function, expected: Mapping[str, Location]
) -> Iterator[str]:
    actual = {name: _location(package, value) for name, value in _blobs(function).items()}
    for name in dict.fromkeys([*expected, *actual]):
        if actual.get(name) != expected.get(name):
            texts = (
                f"at {location[1]} of {location[0].name}" if location else "not there"
                for location in (actual.get(name), expected.get(name))
            )
            yield f"{function.name}: {name} is {'; expected '.join(texts)}"


def _check_uses(function: Function, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    sites = {
        part_name(tensor, label).partition(".")[0]: site_of(tensor)
        for tensor, stored in tensors.items()
        for label in stored.parts
    }
    unused = dict.fromkeys(sites)
    for operation in function.walk():
        for value in chain(*operation.inputs.values()):
            if not isinstance(value, Name) or value.name not in sites:
                continue
            unused.pop(value.name, None)
            site = sites[value.name]
            if not operation.name.startswith(site.replace(".", "_")) and site != _SHARED:
                where = f"{function.name}: {operation.type} {operation.label}"
                yield f"{where}: it takes {value.name}, which belongs to {site}"
    for name in unused:
        yield f"{function.name}: nothing uses {name}"


def _check_digests(package: packages.Package, blobs: Mapping[str, FileValue]) -> Iterator[str]:
    text = package.description.metadata.userDefined.get(DIGESTS, "null")
    try:
        expected = from_json(dict[str, str], parse_json(text))
    except Mismatch as error:
        yield f"its metadata are damaged: {DIGESTS}: {error}"
        return

    def digest(value: FileValue) -> str:
        path, start = _location(package, value)
        return hash_file(path, start=start, length=value.type.nbytes).sha256[:_DIGEST_LENGTH]

    values = set(blobs.values())
    with ThreadPoolExecutor() as pool:
        actual = dict(zip(values, pool.map(digest, values), strict=True))
    for name in dict.fromkeys([*blobs, *expected]):
        if name not in blobs or actual[blobs[name]] != expected.get(name):
            yield f"{name} was altered (its hash differs)"


OPERATIONS = frozenset(
    (
        "add cast concat const constexpr_blockwise_shift_scale constexpr_lut_to_dense cos equal "
        "exp gather gelu greater_equal less_equal linear logical_and matmul mul read_state "
        "reduce_mean reduce_sum reshape rsqrt select sigmoid sin slice_by_index softmax sqrt sub "
        "tanh transpose write_state"
    ).split()
)
_SYSTEMS = {6: "iOS 15", 7: "iOS 16", 8: "iOS 17", 9: "iOS 18", 10: "iOS 26"}
_GROUPS = "inputs", "outputs", "states"
_MAX_CHARACTERS, _MAX_PROBLEMS = 60, 20
"""Limits of a text of the metadata, and of the listed problems."""
_NUMBER = re.compile(r"(?<=_)\d+(?=_)")


def describe_package(path: Path) -> dict[str, Any]:
    """Describes a package as JSON; checks our own ones with all hashes, and lists `problems`."""
    package = packages.open_package(path)
    metadata = package.description.metadata
    ours = CONFIG in metadata.userDefined
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    kinds = {op.type for function in package.functions.values() for op in function.walk()}
    values = packages.file_values(package.functions.values())
    totals: dict[str, Counter[str]] = {}
    for kind in {(value.file, value.offset): value.type for value in values}.values():
        total = totals.setdefault(kind.dtype, Counter())
        total.update(blobs=1, items=kind.size, bytes=kind.nbytes)
    return {
        "kind": "mlpackage",
        "name": path.resolve().name.removesuffix(packages.PACKAGE_SUFFIX),
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
        "weights": [{"dtype": dtype, **total} for dtype, total in sorted(totals.items())],
        "unchecked": sorted(kinds - OPERATIONS),
        "problems": list(check_without_manifest(package)) if ours else [],
        "files": {name: {"size": size} for name, size in sizes.items()},
    }


def _function(function: Function, package: packages.Package) -> dict[str, Any]:
    types = {name: kind for op in function.operations for name, kind in op.outputs}
    types |= function.inputs | function.states
    # A model of a single function has its features beside the list of functions.
    described = {message.name: message for message in package.description.functions}
    features = described.get(function.name, package.description)
    all_features = chain(features.input, features.output, features.state)
    helps = {feature.name: feature.shortDescription for feature in all_features}

    def value(name: str) -> dict[str, Any]:
        kind = types.get(name)
        form = {"dtype": kind.dtype, "shape": list(kind.shape)} if kind else {}
        return {"name": name, **form, "help": helps.get(name, "")}

    groups = {group: list(map(value, getattr(function, group))) for group in _GROUPS}
    counts = Counter(operation.type for operation in function.walk())
    return {**groups, "operations": dict(counts.most_common())}


def package_text(description: dict[str, Any]) -> Iterator[str | Table]:
    version, default = description["specification_version"], description["default_function"]
    system = _SYSTEMS.get(version)
    facts = (
        f"{description['name']}: Core ML package",
        f"specification {version}" + (f" ({system} or later)" if system else ""),
        f"functions {', '.join(description['functions'])} (by default {default})",
        amount(description["size"]),
    )
    yield ", ".join(facts) + f"\n{description['path']}\n"
    texts = {name: " ".join(value.split()) for name, value in description["metadata"].items()}
    metadata = (
        (name, text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 3]}...")
        for name, text in texts.items()
        if text
    )
    yield Table("Metadata", ("", ""), metadata)
    header = ("function", "", "name", "dtype", "shape")
    values = (
        (name, group.removesuffix("s"), *row)
        for name, function in description["functions"].items()
        for group in _GROUPS
        for row in _grouped_rows(function[group])
    )
    yield Table("Inputs, outputs and states", header, values)
    names = tuple(description["functions"])
    counts = [function["operations"] for function in description["functions"].values()]
    operations = (
        (kind, *(f"{count.get(kind, 0):,}" for count in counts))
        for kind in sorted({kind for count in counts for kind in count})
    )
    yield Table("Operations", ("type", *names), operations, names)
    numbers = ("blobs", "items", "size")
    weights = (
        (w["dtype"], f"{w['blobs']:,}", f"{w['items']:,}", amount(w["bytes"]))
        for w in description["weights"]
    )
    yield Table("Weights", ("dtype", *numbers), weights, numbers)
    files = ((name, amount(record["size"])) for name, record in description["files"].items())
    yield Table("Files", ("name", "size"), files, ("size",))
    yield _closing(description)


def _closing(description: dict[str, Any]) -> str:
    if problems := description["problems"]:
        lines = [f"Problem: {problem}" for problem in problems[:_MAX_PROBLEMS]]
        if len(problems) > _MAX_PROBLEMS:
            lines.append(f"and {len(problems) - _MAX_PROBLEMS} more problems")
        return "\n".join(lines)
    if description["made_by_rgexport"]:
        return "No problems."
    unknown = ", ".join(description["unchecked"])
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
