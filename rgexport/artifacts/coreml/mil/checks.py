"""Checks of a package that Core ML does not make: lost states, and wrong or altered weights."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from rgexport.artifacts.coreml.mil.package import HEADER_BYTES, Package
from rgexport.artifacts.coreml.mil.program import FileValue, Function, Name, Operation
from rgexport.artifacts.manifest import StoredTensor
from rgexport.files.hashing import hash_file
from rgexport.files.typed_json import Mismatch, from_json, parse_json
from rgexport.griffin.layout import site_of

CONFIG = "rgexport.config"
"""Key of a package's metadata that holds the Griffin configuration."""

DIGESTS = "rgexport.weights"
"""Key of a package's metadata that holds the hash of each stored part."""

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
"""(operation, input) → the part of a stored tensor, where its name differs from the input's."""

OPERATIONS = frozenset(
    {
        "add",
        "cast",
        "concat",
        "const",
        "constexpr_blockwise_shift_scale",
        "constexpr_lut_to_dense",
        "cos",
        "equal",
        "exp",
        "gather",
        "gelu",
        "greater_equal",
        "less_equal",
        "linear",
        "logical_and",
        "matmul",
        "mul",
        "read_state",
        "reduce_mean",
        "reduce_sum",
        "reshape",
        "rsqrt",
        "select",
        "sigmoid",
        "sin",
        "slice_by_index",
        "softmax",
        "sqrt",
        "sub",
        "tanh",
        "transpose",
        "write_state",
    }
)
"""Types of the operations that rgexport can run."""


class _Location(NamedTuple):
    path: Path
    offset: int


def check_package(
    package: Package, uses: Mapping[str, Mapping[str, StoredTensor]]
) -> Iterator[str]:
    """Yields complaints about states and weights.

    `uses` maps the name of each function to the manifest's weights that the function must use.
    """
    for function in package.functions.values():
        tensors = uses.get(function.name, {})
        expected = _expected_locations(package.path.parent, tensors)

        yield from _check_states(function)
        yield from _check_locations(package, function, expected)
        yield from _check_uses(function, tensors)


def check_without_manifest(package: Package) -> Iterator[str]:
    """Yields complaints about states, and about weights that do not match the metadata's hashes.

    The functions of a segment must use the same weights.
    """
    blobs_by_segment: dict[str, dict[str, FileValue]] = {}
    for function in package.functions.values():
        segment = function.name.rpartition("_")[0]
        blobs = _blobs(function)
        first_blobs = blobs_by_segment.setdefault(segment, blobs)
        expected = _locations(package, first_blobs)

        yield from _check_states(function)
        yield from _check_locations(package, function, expected)

    all_blobs: dict[str, FileValue] = {}
    for blobs in blobs_by_segment.values():
        all_blobs.update(blobs)
    yield from _check_digests(package, all_blobs)


def part_name(tensor: str, label: str) -> str:
    """Returns `OPERATION.PART`, the name of a tensor's part in a program.

    The operation is named after the tensor, and its row group if it has several, with `_` for dots.
    """
    full_name = f"{tensor}.{label}"
    weight, _, part = full_name.rpartition(".")
    operation = weight.replace(".", "_")
    return f"{operation}.{part}"


def short_digests(blobs: Mapping[str, str]) -> dict[str, str]:
    """Returns the shortened hashes of a package's metadata by the names of `part_name`.

    `blobs` maps `TENSOR.PART` to the SHA-256 of the part.
    """
    digests = {}
    for blob, digest in blobs.items():
        tensor, label = blob.rsplit(".", 1)
        name = part_name(tensor, label)
        digests[name] = digest[:_DIGEST_LENGTH]
    return digests


# ---- States -----------------------------------------------------------------------------------


def _check_states(function: Function) -> Iterator[str]:
    """Complains of states that are not written once, or not computed from their old value.

    A call of as many tokens as a state has slots may replace all of it.
    """
    num_tokens = _num_tokens(function)
    bits = _state_bits(function)
    sources: dict[str, int] = {}  # value → a bit for each state that it was computed from
    written: set[str] = set()

    for operation in function.walk():
        source_bits = _source_bits(operation, sources)
        state = _state_handle(operation)
        if operation.type == "read_state" and state in function.states:
            source_bits |= bits[state]
        elif operation.type == "write_state" and state in function.states:
            write = f"{function.name}: {operation.type} {operation.label}"
            depends_on_old_value = bool(source_bits & bits[state])
            if state in written:
                yield f"{write}: the state {state} is written a second time"
            elif not depends_on_old_value and _num_slots(function, state) > num_tokens:
                yield (
                    f"{write}: the new value of the state {state} does not depend on its old "
                    "value, so the past would be lost"
                )
            written.add(state)
        for name, _ in operation.outputs:
            sources[name] = source_bits

    for state in function.states.keys() - written:
        yield f"{function.name}: state {state} is never written"


def _state_bits(function: Function) -> dict[str, int]:
    """Returns a number with a single bit for each state."""
    bits = {}
    for index, name in enumerate(function.states):
        bits[name] = 1 << index
    return bits


def _num_tokens(function: Function) -> int:
    """Returns the number of tokens that a call takes."""
    positions = function.inputs.get(_TOKENS)
    if positions is None or not positions.shape:
        return 1
    return positions.shape[-1]


def _num_slots(function: Function, state: str) -> int:
    """Returns the number of tokens that a state holds values of."""
    shape = function.states[state].shape
    if len(shape) < 2:
        return 1
    return shape[-2]


def _source_bits(operation: Operation, sources: Mapping[str, int]) -> int:
    """Returns a bit for each state that an operand was computed from."""
    bits = 0
    for value in chain(*operation.inputs.values()):
        if isinstance(value, Name):
            bits |= sources.get(value.name, 0)
    return bits


def _state_handle(operation: Operation) -> str:
    """Returns the name of the operation's single `input`, or an empty text."""
    values = operation.inputs.get("input", ())
    if len(values) == 1 and isinstance(values[0], Name):
        return values[0].name
    return ""


# ---- Locations of weights ---------------------------------------------------------------------


def _expected_locations(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, _Location]:
    """Returns the location of each part in the manifest of an artifact in `folder`."""
    locations = {}
    for tensor, stored in tensors.items():
        for label, part in stored.parts.items():
            name = part_name(tensor, label)
            path = folder / part.file
            locations[name] = _Location(path, part.offset)
    return locations


def _blobs(function: Function) -> dict[str, FileValue]:
    """Returns the function's constants in weight files, by the names of `part_name`."""
    blobs = {}
    for operation in function.walk():
        operation_name = operation.name
        if operation.outputs:
            operation_name, _ = operation.outputs[0]

        for parameter, value in operation.constants:
            if isinstance(value, FileValue):
                label = _LABELS.get((operation.type, parameter), parameter)
                blobs[f"{operation_name}.{label}"] = value
    return blobs


def _locations(package: Package, blobs: Mapping[str, FileValue]) -> dict[str, _Location]:
    locations = {}
    for name, value in blobs.items():
        locations[name] = _location(package, value)
    return locations


def _location(package: Package, value: FileValue) -> _Location:
    """Returns the location of a constant's data, which follow its header."""
    file = package.blob_files[value.file]
    data_offset = value.offset + HEADER_BYTES
    return _Location(file.path, data_offset)


def _check_locations(
    package: Package, function: Function, expected: Mapping[str, _Location]
) -> Iterator[str]:
    actual = _locations(package, _blobs(function))
    for name in dict.fromkeys([*expected, *actual]):
        location = actual.get(name)
        expected_location = expected.get(name)
        if location != expected_location:
            difference = f"{_text(location)}; expected {_text(expected_location)}"
            yield f"{function.name}: {name} is {difference}"


def _text(location: _Location | None) -> str:
    if location is None:
        return "not there"
    return f"at {location.offset} of {location.path.name}"


# ---- Uses of weights --------------------------------------------------------------------------


def _check_uses(function: Function, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Complains of weights that no operation uses, or an operation of another site.

    Only the embedding may be used at two sites: the output head shares it.
    """
    sites = _sites_by_weight(tensors)
    unused = dict.fromkeys(sites)
    for operation in function.walk():
        for value in chain(*operation.inputs.values()):
            if not isinstance(value, Name) or value.name not in sites:
                continue

            unused.pop(value.name, None)
            site = sites[value.name]
            operation_prefix = site.replace(".", "_")
            is_of_site = operation.name.startswith(operation_prefix)
            if not is_of_site and site != _SHARED:
                where = f"{function.name}: {operation.type} {operation.label}"
                yield f"{where}: it takes {value.name}, which belongs to {site}"

    for name in unused:
        yield f"{function.name}: nothing uses {name}"


def _sites_by_weight(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Returns the site of each weight, named like the operation that has its data."""
    sites = {}
    for tensor, stored in tensors.items():
        site = site_of(tensor)
        for label in stored.parts:
            name = part_name(tensor, label)
            weight, _, _ = name.partition(".")
            sites[weight] = site
    return sites


# ---- Hashes of weights ------------------------------------------------------------------------


def _check_digests(package: Package, blobs: Mapping[str, FileValue]) -> Iterator[str]:
    metadata = package.description.metadata.userDefined
    text = metadata.get(DIGESTS, "null")
    try:
        fields = parse_json(text)
        expected = from_json(dict[str, str], fields)
    except Mismatch as error:
        yield f"its metadata are damaged: {DIGESTS}: {error}"
        return

    actual = _digests_of_data(package, blobs)
    for name in dict.fromkeys([*blobs, *expected]):
        if name not in actual or actual[name] != expected.get(name):
            yield f"{name} was altered (its hash differs)"


def _digests_of_data(package: Package, blobs: Mapping[str, FileValue]) -> dict[str, str]:
    """Returns the shortened hashes of constants; each is hashed once, several at a time."""
    values = set(blobs.values())
    short_digest = partial(_short_digest, package)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(short_digest, values)
        by_value = dict(zip(values, digests, strict=True))
    return {name: by_value[value] for name, value in blobs.items()}


def _short_digest(package: Package, value: FileValue) -> str:
    path, start = _location(package, value)
    length = value.type.nbytes
    record = hash_file(path, start=start, length=length)
    return record.sha256[:_DIGEST_LENGTH]
