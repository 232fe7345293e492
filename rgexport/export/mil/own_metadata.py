"""What a package of ours has in its metadata, so that it can be checked without a manifest.

The Griffin configuration, and a hash of every weight, by `OPERATION.PART`: the operation that gives
it, and which part of a stored tensor its input is, such as
`layers_0_mlp_block_up_proj_weight.scales`. So a weight that was altered or swapped can be named.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from rgexport.export.mil.agreement import INPUTS
from rgexport.export.mil.blob import HEADER_BYTES
from rgexport.export.mil.conventions import bound_constants, operation_name, operations_by_name
from rgexport.export.mil.package import Package
from rgexport.export.mil.program import FileValue
from rgexport.export.typed_json import parse
from rgexport.files.hashing import hash_file
from rgexport.griffin.config import GriffinConfig

CONFIG, DIGESTS = "rgexport.config", "rgexport.weights"
"""Keys of the metadata: the Griffin configuration, and the hashes."""
_LENGTH = 16
"""Hexadecimal digits that are kept of a hash: enough against mistakes."""

Digests = Mapping[str, str]


def short_digests(blobs: Digests) -> dict[str, str]:
    """For the metadata, from `TENSOR.PART` → SHA-256 in hexadecimal."""
    short = {}
    for blob, digest in blobs.items():
        tensor, _, label = blob.rpartition(".")
        short[f"{operation_name(tensor)}.{label}"] = digest[:_LENGTH]
    return short


def write_config(config: GriffinConfig) -> str:
    """For the metadata."""
    return json.dumps(config.to_dict())


def read_digests(package: Package) -> dict[str, str]:
    """What the metadata say.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    if DIGESTS not in package.description.user_defined:
        raise ValueError(f"there is no {DIGESTS}")
    digests = parse(package.description.user_defined[DIGESTS])
    if not isinstance(digests, dict) or not all(isinstance(d, str) for d in digests.values()):
        raise ValueError(f"{DIGESTS} holds no hashes")
    return digests


def check_metadata(package: Package, config: GriffinConfig, blobs: Digests) -> Iterator[str]:
    """What the metadata have otherwise than a manifest, with `blobs`: `TENSOR.PART` → SHA-256."""
    if package.description.user_defined.get(CONFIG) != write_config(config):
        yield f"its metadata are damaged: {CONFIG} is not the configuration of the manifest"
    try:
        ours, theirs = read_digests(package), short_digests(blobs)
    except ValueError as error:
        yield f"its metadata are damaged: {error}"
        return
    for name in dict.fromkeys([*theirs, *ours]):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: its hash in the manifest is not the one in the package's metadata"


def altered_blobs(package: Package, digests: Digests) -> list[str]:
    """Names of the weights that are not what their hash was made of, or have none; reads all.

    The package was checked before, so that blobs lie inside of their files.
    """
    blobs = _weight_blobs(package)

    def altered(name: str) -> bool:
        value, digest = blobs.get(name), digests.get(name)
        if value is None or digest is None:
            return True
        path, start = package.blob_files[value.file].path, value.offset + HEADER_BYTES
        found = hash_file(path, start=start, length=value.type.nbytes).sha256
        return found[:_LENGTH] != digest

    names = list(dict.fromkeys([*blobs, *digests]))
    with ThreadPoolExecutor() as pool:
        return [n for n, wrong in zip(names, pool.map(altered, names), strict=True) if wrong]


def _weight_blobs(package: Package) -> dict[str, FileValue]:
    """`OPERATION.PART` → where it lies, of the default function's weights."""
    operations = operations_by_name(package.functions[package.default_function])
    found = {}
    for name, operation in operations.items():
        labels = INPUTS.get(operation.type, {})
        for parameter, value in bound_constants(operation, operations).items():
            if isinstance(value, FileValue) and parameter in labels:
                found[f"{name}.{labels[parameter]}"] = value
    return found
