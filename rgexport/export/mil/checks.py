"""Checks of a package that rgexport made: its states are kept, and its weights are the right ones.

Faults of this kind would change what a package computes without any error. Types, shapes and
operations are not checked here: coremltools' builder infers them when the program is built,
coremltools' loader agrees (`tests/export/coreml/test_parity.py`), and Core ML and the interpreter
refuse operands that do not fit.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from rgexport.export.manifest import StoredTensor
from rgexport.export.mil.blob import HEADER_BYTES
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import FileValue, Function, Name, Operation, TensorType
from rgexport.files.hashing import hash_file
from rgexport.files.typed_json import parse_json
from rgexport.griffin.layout import site_of

CONFIG, DIGESTS = "rgexport.config", "rgexport.weights"
"""Keys of a package's metadata: the Griffin configuration, and the hash of each stored part."""
_DIGEST_LENGTH = 16
"""Hexadecimal digits of a SHA-256 that the metadata keep: enough against mistakes."""
_SHARED = "embed_tokens"
"""The site of the one weight that has another one: the output head uses it too."""
_TOKENS = "position_ids"
"""The input whose last axis says how many tokens a function takes; each that has states has it."""
_LABELS = {
    ("const", "val"): "data",
    ("constexpr_blockwise_shift_scale", "scale"): "scales",
    ("constexpr_blockwise_shift_scale", "offset"): "zero_points",
    ("constexpr_lut_to_dense", "indices"): "data",
}
"""(operation, input) → the part of a stored tensor, where it has another name than the input."""

Places = Mapping[str, tuple[Path, int]]
"""`OPERATION.PART` → the file that holds that part of a weight, and where its data begin."""


def check_package(
    package: Package, uses: Mapping[str, Mapping[str, StoredTensor]]
) -> Iterator[str]:
    """Complaints about a package in the folder of an artifact.

    Args:
        package: the package.
        uses: function → the weights of the artifact's manifest that it shall use.
    """
    folder = package.path.parent
    for function in package.functions.values():
        tensors = uses.get(function.name, {})
        places = {
            part_name(tensor, label): (folder / part.file, part.offset)
            for tensor, stored in tensors.items()
            for label, part in stored.parts.items()
        }
        yield from check_states(function)
        yield from _check_places(package, function, places)
        yield from _check_uses(function, tensors)


def check_without_manifest(package: Package) -> Iterator[str]:
    """Complaints about a package of rgexport without its manifest; reads all of its weights.

    The functions of a segment must use the same weights, and all must have the hashes in the
    metadata.
    """
    first: dict[str, dict[str, FileValue]] = {}
    for function in package.functions.values():
        segment = function.name.rpartition("_")[0]
        blobs = first.setdefault(segment, _blobs(function))
        places = {name: _place(package, blob) for name, blob in blobs.items()}
        yield from check_states(function)
        yield from _check_places(package, function, places)
    yield from _check_digests(package, {k: v for blobs in first.values() for k, v in blobs.items()})


def made_by_rgexport(package: Package) -> bool:
    """Whether its metadata say so."""
    return CONFIG in package.description.metadata.userDefined


def part_name(tensor: str, label: str) -> str:
    """`OPERATION.PART` of a part of a tensor: the operation has the tensor's name without dots.

    Each row group has an operation of its own; its number is before the names of its parts.
    """
    weight, _, part = f"{tensor}.{label}".rpartition(".")
    return f"{_operation_name(weight)}.{part}"


def short_digests(blobs: Mapping[str, str]) -> dict[str, str]:
    """For the metadata, from `TENSOR.PART` → SHA-256 in hexadecimal."""
    names = {blob: part_name(*blob.rsplit(".", 1)) for blob in blobs}
    return {names[blob]: digest[:_DIGEST_LENGTH] for blob, digest in blobs.items()}


def check_states(function: Function) -> Iterator[str]:
    """Each state must be written once, with a value that was computed from it.

    One that is written twice, or with what was computed without it, was mixed up with another. Only
    a chunk of as many tokens as a state [1, 1, slots, width] has slots replaces all of it.
    """
    ids = function.inputs.get(_TOKENS)
    chunk = ids.shape[-1] if ids and ids.shape else 1
    bits = {name: 1 << index for index, name in enumerate(function.states)}
    origins: dict[str, int] = {}
    """Value → the bits of all states that it was computed from."""
    written: set[str] = set()
    for operation in function.walk():
        bound = [v for v in chain(*operation.inputs.values()) if isinstance(v, Name)]
        origin = 0
        for value in bound:
            origin |= origins.get(value.name, 0)
        state = _state_of(operation)
        if operation.type == "read_state":
            origin |= bits.get(state, 0)
        elif operation.type == "write_state" and state in bits:
            where = f"{function.name}: {operation.type} {operation.label}"
            if state in written:
                yield f"{where}: it writes the state {state} a second time"
            elif not origin & bits[state] and _slots(function.states[state]) > chunk:
                yield f"{where}: it writes the state {state} with what does not come from it"
            written.add(state)
        origins.update((name, origin) for name, _ in operation.outputs)
    for state in bits.keys() - written:
        yield f"{function.name}: state {state} is never written"


def _slots(kind: TensorType) -> int:
    return kind.shape[-2] if len(kind.shape) > 1 else 1


def _state_of(operation: Operation) -> str:
    """The state that an operation reads or writes."""
    bound = operation.inputs.get("input", ())
    return bound[0].name if len(bound) == 1 and isinstance(bound[0], Name) else ""


def _operation_name(tensor: str) -> str:
    return tensor.replace(".", "_")


def _blobs(function: Function) -> dict[str, FileValue]:
    """`OPERATION.PART` → the value in a weight file."""
    found = {}
    for operation in function.walk():
        name = operation.outputs[0][0] if operation.outputs else operation.name
        for parameter, value in operation.constants:
            if isinstance(value, FileValue):
                found[f"{name}.{_LABELS.get((operation.type, parameter), parameter)}"] = value
    return found


def _place(package: Package, value: FileValue) -> tuple[Path, int]:
    return package.blob_files[value.file].path, value.offset + HEADER_BYTES


def _check_places(package: Package, function: Function, expected: Places) -> Iterator[str]:
    found = {name: _place(package, value) for name, value in _blobs(function).items()}
    for name in dict.fromkeys([*expected, *found]):
        here, there = found.get(name), expected.get(name)
        if here != there:
            yield f"{function.name}: {name} is {_words(here)}; expected {_words(there)}"


def _words(place: tuple[Path, int] | None) -> str:
    return f"at {place[1]} of {place[0].name}" if place else "not there"


def _check_uses(function: Function, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Weights that are used at another site than their own, or nowhere."""
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
    values = set(blobs.values())
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda value: _short_digest(package, value), values)
        found = dict(zip(values, hashes, strict=True))
    for name in dict.fromkeys([*blobs, *expected]):
        if name not in blobs or found[blobs[name]] != expected.get(name):
            yield f"{name} was altered (its hash differs)"


def _short_digest(package: Package, value: FileValue) -> str:
    path, start = _place(package, value)
    return hash_file(path, start=start, length=value.type.nbytes).sha256[:_DIGEST_LENGTH]


def _read_digests(package: Package) -> dict[str, str]:
    """What the metadata say.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    text = package.description.metadata.userDefined.get(DIGESTS)
    if text is None:
        raise ValueError(f"there is no {DIGESTS}")
    digests = parse_json(text)
    if not isinstance(digests, dict) or not all(isinstance(d, str) for d in digests.values()):
        raise ValueError(f"{DIGESTS} holds no hashes")
    return digests
