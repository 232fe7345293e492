"""Checks a package that rgexport made: its states are kept, and its weights are the right ones.

Such faults would change what a package computes without any error; others, Core ML refuses.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from rgexport.export.manifest import StoredTensor
from rgexport.export.mil.package import HEADER_BYTES, Package
from rgexport.export.mil.program import FileValue, Function, Name
from rgexport.files.hashing import hash_file
from rgexport.files.typed_json import parse_json
from rgexport.griffin.layout import site_of

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
    package: Package, uses: Mapping[str, Mapping[str, StoredTensor]]
) -> Iterator[str]:
    """Yields complaints; `uses` has for each function the weights that it must use."""
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


def check_without_manifest(package: Package) -> Iterator[str]:
    """Yields complaints; all weights have their hashes, and a segment's functions share them."""
    by_segment: dict[str, dict[str, FileValue]] = {}
    for function in package.functions.values():
        segment = function.name.rpartition("_")[0]
        blobs = by_segment.setdefault(segment, _blobs(function))
        expected = {name: _location(package, blob) for name, blob in blobs.items()}
        yield from _check_states(function)
        yield from _check_locations(package, function, expected)
    weights = {name: blob for blobs in by_segment.values() for name, blob in blobs.items()}
    yield from _check_digests(package, weights)


def made_by_rgexport(package: Package) -> bool:
    return CONFIG in package.description.metadata.userDefined


def part_name(tensor: str, label: str) -> str:
    """Returns `OPERATION.PART`, without dots in the operation's name; a row group has its own."""
    weight, _, part = f"{tensor}.{label}".rpartition(".")
    return f"{_operation_name(weight)}.{part}"


def _operation_name(tensor: str) -> str:
    return tensor.replace(".", "_")


def short_digests(blobs: Mapping[str, str]) -> dict[str, str]:
    return {
        part_name(*blob.rsplit(".", 1)): digest[:_DIGEST_LENGTH] for blob, digest in blobs.items()
    }


def _check_states(function: Function) -> Iterator[str]:
    """Complains of states that are not written once from their old value; a long chunk need not."""
    ids = function.inputs.get(_TOKENS)
    chunk = ids.shape[-1] if ids and ids.shape else 1
    bits = {name: 1 << index for index, name in enumerate(function.states)}
    sources: dict[str, int] = {}  # value → a bit for each state that it was computed from
    written: set[str] = set()
    for operation in function.walk():
        operands = [v.name for v in chain(*operation.inputs.values()) if isinstance(v, Name)]
        states = 0
        for name in operands:
            states |= sources.get(name, 0)
        bound = operation.inputs.get("input", ())
        state = bound[0].name if len(bound) == 1 and isinstance(bound[0], Name) else ""
        if operation.type == "read_state" and state in function.states:
            states |= bits[state]
        elif operation.type == "write_state" and state in function.states:
            write = f"{function.name}: {operation.type} {operation.label}"
            shape = function.states[state].shape
            slots = shape[-2] if len(shape) > 1 else 1
            if state in written:
                yield f"{write}: the state {state} is written a second time"
            elif not states & bits[state] and slots > chunk:
                yield (
                    f"{write}: the new value of the state {state} does not depend on its old "
                    "value, so the past would be lost"
                )
            written.add(state)
        sources.update((name, states) for name, _ in operation.outputs)
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


def _location(package: Package, value: FileValue) -> Location:
    return package.blob_files[value.file].path, value.offset + HEADER_BYTES


def _check_locations(
    package: Package, function: Function, expected: Mapping[str, Location]
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
    """Complains of weights that are used at another site than their own, or nowhere."""
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
            if not operation.name.startswith(_operation_name(site)) and site != _SHARED:
                where = f"{function.name}: {operation.type} {operation.label}"
                yield f"{where}: it takes {value.name}, which belongs to {site}"
    for name in unused:
        yield f"{function.name}: nothing uses {name}"


def _check_digests(package: Package, blobs: Mapping[str, FileValue]) -> Iterator[str]:
    try:
        expected = _read_digests(package)
    except ValueError as error:
        yield f"its metadata are damaged: {error}"
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


def _read_digests(package: Package) -> dict[str, str]:
    text = package.description.metadata.userDefined.get(DIGESTS)
    if text is None:
        raise ValueError(f"there is no {DIGESTS}")
    digests = parse_json(text)
    if not isinstance(digests, dict) or not all(isinstance(d, str) for d in digests.values()):
        raise ValueError(f"{DIGESTS} holds no hashes")
    return digests
