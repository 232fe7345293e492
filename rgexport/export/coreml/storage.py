"""Writes the weights of packages into MIL blob files, as `artifacts.coreml.storage` reads them."""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rgexport.artifacts.coreml.package import PackagePlan, weight_file
from rgexport.artifacts.coreml.storage import (
    ALIGNMENT,
    BLOB_HEADER,
    BLOB_HEADER_BYTES,
    part_shapes,
    transform_of,
    with_sign,
)
from rgexport.artifacts.manifest import StoredPart, StoredTensor
from rgexport.artifacts.storage import groups_of
from rgexport.errors import RequestError
from rgexport.export import storage
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize.algorithms.statistics import StatisticsOf, no_statistics
from rgexport.quantize.schemes import registry as schemes
from rgexport.quantize.schemes.base import Shape

_VERSION, _SENTINEL = 2, 0xDEADBEEF
_FILE_HEADER = struct.Struct("<II56x")
MOST_PADDING = 2 * ALIGNMENT  # most bytes of a blob's header and of the padding before it
_BLOB_TYPES = {"float16": 1, "float32": 2, "uint8": 3, "int8": 4, "int4": 8, "uint4": 11}


class CoreMLStorage:
    def __init__(
        self, plan: schemes.Plan, shapes: Mapping[str, Shape], packages: Sequence[PackagePlan]
    ):
        tensors: dict[str, StoredTensor] = {}
        self.sizes: dict[str, int] = {}
        for package in packages:
            file = weight_file(package.name)
            allocator = storage.OffsetAllocator(
                file, ALIGNMENT, _FILE_HEADER.size, BLOB_HEADER_BYTES
            )
            tensors |= allocator.allocate(package.tensors(plan), shapes, part_shapes)
            self.sizes[file] = allocator.size
        self.tensors = {name: tensors[name] for name in plan}

    def write(
        self, folder: Path, weights: WeightSource, statistics: StatisticsOf = no_statistics
    ) -> dict[str, str]:
        """Writes the files in `folder`; returns the SHA-256 of every blob, by `TENSOR.PART`."""
        digests = {blob: hashlib.sha256() for blob, _, _ in self._blobs()}

        def hash_slab(name: str, slab: schemes.Parts) -> None:
            for label, rows in slab.items():
                digests[f"{name}.{label}"].update(rows.data)

        storage.fill(
            folder, self.sizes, self.tensors, weights, partial(encode, statistics), hash_slab
        )
        for name in self.sizes:
            blobs = [blob for blob in self._blobs() if blob[1].file == name]
            with open(folder / name, "r+b") as file:
                file.write(_FILE_HEADER.pack(len(blobs), _VERSION))
                for _, part, dtype in blobs:
                    file.seek(part.offset - BLOB_HEADER_BYTES)
                    header = _SENTINEL, _BLOB_TYPES[dtype], part.nbytes, part.offset, 0
                    file.write(BLOB_HEADER.pack(*header))
        return {blob: digest.hexdigest() for blob, digest in digests.items()}

    def _blobs(self) -> Iterator[tuple[str, StoredPart, str]]:
        for name, stored in self.tensors.items():
            for group in groups_of(stored):
                for label, part in group.stored.parts.items():
                    blob = f"{name}.{group.prefix}{label}"
                    yield blob, part, blob_dtype(label, group.stored)


def blob_dtype(label: str, stored: StoredTensor) -> str:
    """Returns MIL's name for the dtype of a part; items of 4 bits are packed two to a byte."""
    scheme, dtype = stored.uniform, stored.parts[label].dtype
    if dtype != "uint8" or scheme.level_bits != 4:
        return dtype
    return "int4" if scheme.symmetric_bits == 4 else "uint4"


def encode(
    statistics: StatisticsOf, name: str, rows: np.ndarray, ids: np.ndarray, stored: StoredTensor
) -> schemes.Parts:
    values = transform_of(name).store(rows.astype(np.float32, copy=False))
    scheme = stored.uniform
    scale_dtype = scheme.scale_dtype
    if scale_dtype is None:
        return scheme.encode(name, values, statistics(name), ids)
    _require_held(name, np.abs(values).max(initial=0), scale_dtype)
    arrays = scheme.encode(name, values, statistics(name), ids)
    steps = np.abs(arrays["scales"].astype(np.float32))
    largest = steps.max(initial=0) * np.float32(scheme.largest_multiple)
    _require_held(name, largest, scale_dtype)
    return with_sign(arrays, scheme, stored.parts["data"].dtype)


def _require_held(name: str, largest: np.float32, dtype: schemes.FloatDtype) -> None:
    """Refuses weights that are infinities where an engine multiplies in the dtype of the scales."""
    with np.errstate(over="ignore"):
        held = np.isfinite(largest.astype(dtype))
    if not held:
        raise RequestError(
            f"{name}: weights of {largest:.4g} are more than {dtype} holds; take --compute fp32"
        )
