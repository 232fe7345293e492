"""Writes the files of weights as a stream: a MIL blob file, version 2.

A header of 64 bytes is followed by the blobs, each with its own header of 64 bytes, at multiples of
64. MIL's C++ `StorageFormat.hpp` defines the headers; coremltools' blob reader reads them.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from rgexport.export.coreml.package import weight_file
from rgexport.export.coreml.parts import encode, part_layouts
from rgexport.export.coreml.segments import PackagePlan
from rgexport.export.manifest import StoredPart, StoredTensor
from rgexport.export.row_groups import groups_of
from rgexport.export.storage import Places, fill
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize.scheme import Affine, Palette, Parts, Plan
from rgexport.quantize.statistics import StatisticsOf, no_statistics

ALIGNMENT = 64
_VERSION, _SENTINEL = 2, 0xDEADBEEF
_FILE_HEADER, _BLOB_HEADER = struct.Struct("<II56x"), struct.Struct("<IIQQQ32x")
BLOB_HEADER_BYTES = _BLOB_HEADER.size
"""A program has the offset of a blob's header; the data follow it."""
MOST_PADDING = 2 * ALIGNMENT
"""Bytes that a blob may take beside its data: a header, and what fills up the one before."""
_BLOB_TYPES = {"float16": 1, "float32": 2, "uint8": 3, "int8": 4, "int4": 8, "uint4": 11}
"""MIL's `BlobDataType`."""


class Storage:
    """The layout of the files: in each, tensors in the plan's order, one after another."""

    def __init__(
        self,
        plan: Plan,
        shapes: Mapping[str, tuple[int, ...]],
        packages: Sequence[PackagePlan],
    ):
        found: dict[str, StoredTensor] = {}
        self._sizes: dict[str, int] = {}
        for package in packages:
            file = weight_file(package.name)
            places = Places(file, ALIGNMENT, _FILE_HEADER.size, BLOB_HEADER_BYTES)
            found |= places.tensors(package.tensors(plan), shapes, part_layouts)
            self._sizes[file] = places.size
        self.tensors = {name: found[name] for name in plan}

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes.values())

    def write(
        self, folder: Path, weights: WeightSource, statistics: StatisticsOf = no_statistics
    ) -> dict[str, str]:
        """Fills the files in `folder` from `weights`; `statistics` are for algorithms.

        Returns:
            The SHA-256 of every blob's data, by `TENSOR.PART`.

        Raises:
            RequestError: a weight that its scheme cannot hold.
            OSError: the disk is full, or the folder cannot be written.
        """
        for name, size in self._sizes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(size)
                self._write_headers(file, name)
        digests = {blob: hashlib.sha256() for blob, _, _ in self._blobs()}

        def hash_slab(name: str, parts: Parts) -> None:
            for label, rows in parts.items():
                digests[f"{name}.{label}"].update(rows.data)

        fill(folder, self.tensors, weights, partial(encode, statistics), hash_slab)
        return {blob: digest.hexdigest() for blob, digest in digests.items()}

    def _blobs(self) -> Iterator[tuple[str, StoredPart, str]]:
        """All blobs: `TENSOR.PART`, its place, and MIL's name of its dtype."""
        for name, stored in self.tensors.items():
            for group in groups_of(stored):
                for label, part in group.stored.parts.items():
                    blob = f"{name}.{group.prefix}{label}"
                    yield blob, part, blob_dtype(label, group.stored)

    def _write_headers(self, file: BinaryIO, name: str) -> None:
        blobs = [blob for blob in self._blobs() if blob[1].file == name]
        file.write(_FILE_HEADER.pack(len(blobs), _VERSION))
        for _, part, dtype in blobs:
            file.seek(part.offset - BLOB_HEADER_BYTES)
            header = _SENTINEL, _BLOB_TYPES[dtype], part.nbytes, part.offset, 0
            file.write(_BLOB_HEADER.pack(*header))


def blob_dtype(label: str, stored: StoredTensor) -> str:
    """MIL's name for the dtype of a part; items of 4 bits are packed two to a byte."""
    scheme, dtype = stored.scheme, stored.parts[label].dtype
    if dtype != "uint8" or not isinstance(scheme, Affine | Palette) or scheme.bits == 8:
        return dtype
    return "int4" if isinstance(scheme, Affine) and scheme.symmetric else "uint4"
