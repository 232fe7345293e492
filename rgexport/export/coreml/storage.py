"""Stores the weights of packages: the parts of tensors, their encoding, and MIL blob files.

A blob file (version 2, as in MIL's C++ `StorageFormat.hpp`) begins with a header of 64 bytes. The
blobs follow at multiples of 64, each with its own header of 64 bytes. MIL has two's complement
where `quantize.schemes.affine` counts from -2^(bits-1) up: symmetric data differ in the top bit.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.export import storage
from rgexport.export.coreml.package import PackagePlan, weight_file
from rgexport.export.manifest import StoredPart, StoredTensor
from rgexport.griffin.layer_ops import Role
from rgexport.griffin.layout import role_of
from rgexport.griffin.tensor import WeightSource
from rgexport.quantize.algorithms.statistics import StatisticsOf, no_statistics
from rgexport.quantize.schemes import registry as schemes
from rgexport.quantize.schemes.base import Shape

ALIGNMENT = 64
_VERSION, _SENTINEL = 2, 0xDEADBEEF
_FILE_HEADER, _BLOB_HEADER = struct.Struct("<II56x"), struct.Struct("<IIQQQ32x")
BLOB_HEADER_BYTES = _BLOB_HEADER.size
"""A program has the offset of a blob's header; the data follow it."""
MOST_PADDING = 2 * ALIGNMENT  # most bytes of a blob's header and of the padding before it
_BLOB_TYPES = {"float16": 1, "float32": 2, "uint8": 3, "int8": 4, "int4": 8, "uint4": 11}
_SIGNED = {4: "uint8", 8: "int8"}
"""Bits → dtype of integers in two's complement; two of 4 bits are a byte."""
_TOP_BITS = {4: np.uint8(0x88), 8: np.uint8(0x80)}
_TRANSFORMS: dict[Role, storage.Transform] = {"norm": storage.NORM, "a_param": storage.DECAY}


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
                    file.write(_BLOB_HEADER.pack(*header))
        return {blob: digest.hexdigest() for blob, digest in digests.items()}

    def _blobs(self) -> Iterator[tuple[str, StoredPart, str]]:
        for name, stored in self.tensors.items():
            for group in storage.groups_of(stored):
                for label, part in group.stored.parts.items():
                    blob = f"{name}.{group.prefix}{label}"
                    yield blob, part, blob_dtype(label, group.stored)


def blob_dtype(label: str, stored: StoredTensor) -> str:
    """Returns MIL's name for the dtype of a part; items of 4 bits are packed two to a byte."""
    scheme, dtype = stored.uniform, stored.parts[label].dtype
    if dtype != "uint8" or scheme.level_bits != 4:
        return dtype
    return "int4" if isinstance(scheme, schemes.Affine) and scheme.symmetric else "uint4"


def part_shapes(shape: tuple[int, ...], scheme: schemes.Scheme) -> schemes.PartShapes:
    """Returns the parts of a scheme, signed where symmetric; raises RequestError for others."""
    if not all(_is_storable(shape, uniform) for uniform in scheme.uniform):
        raise RequestError(
            f"{scheme.label} is a way to store {list(shape)} that Core ML does not have"
        )
    return storage.part_shapes_by_group(shape, scheme, _group_part_shapes)


def _is_storable(shape: tuple[int, ...], scheme: schemes.Uniform) -> bool:
    if not scheme.is_quantized:
        return not isinstance(scheme, schemes.Ggml)
    is_known = isinstance(scheme, schemes.Affine | schemes.Palette) and scheme.bits in _SIGNED
    return is_known and len(shape) == 2 and scheme.fitted(shape) == scheme


def _group_part_shapes(shape: tuple[int, ...], scheme: schemes.Uniform) -> schemes.PartShapes:
    shapes = scheme.part_shapes(shape)
    if isinstance(scheme, schemes.Affine) and scheme.symmetric:
        shapes["data"] = (_SIGNED[scheme.bits], shapes["data"][1])
    return shapes


def encode(
    statistics: StatisticsOf, name: str, rows: np.ndarray, ids: np.ndarray, stored: StoredTensor
) -> schemes.Parts:
    values = _TRANSFORMS.get(role_of(name), storage.PLAIN).store(
        rows.astype(np.float32, copy=False)
    )
    scheme = stored.uniform
    if not isinstance(scheme, schemes.Affine):
        return scheme.encode(name, values, statistics(name), ids)
    _require_held(name, np.abs(values).max(initial=0), scheme.scale)
    arrays = scheme.encode(name, values, statistics(name), ids)
    levels = 2 ** (scheme.bits - 1) if scheme.symmetric else 2**scheme.bits - 1
    steps = np.abs(arrays["scales"].astype(np.float32))
    _require_held(name, steps.max(initial=0) * np.float32(levels), scheme.scale)
    return _with_sign(arrays, scheme, stored.parts["data"].dtype)


def decode(name: str, arrays: schemes.Parts, stored: StoredTensor) -> np.ndarray:
    columns = int(np.prod(stored.shape[1:], dtype=np.int64))
    scheme = stored.uniform
    if isinstance(scheme, schemes.Affine):
        rows = scheme.decode(_with_sign(arrays, scheme, "uint8"), columns)
        rows = rows.astype(scheme.scale)  # engines multiply in the dtype of the scales
    else:
        rows = scheme.decode(arrays, columns)
    transform = _TRANSFORMS.get(role_of(name), storage.PLAIN)
    return transform.restore(rows.astype(np.float32, copy=False))


def _require_held(name: str, largest: np.float32, dtype: schemes.FloatDtype) -> None:
    """Refuses weights that are infinities where an engine multiplies in the dtype of the scales."""
    with np.errstate(over="ignore"):
        held = np.isfinite(largest.astype(dtype))
    if not held:
        raise RequestError(
            f"{name}: weights of {largest:.4g} are more than {dtype} holds; take --compute fp32"
        )


def _with_sign(arrays: schemes.Parts, scheme: schemes.Affine, dtype: str) -> schemes.Parts:
    if not scheme.symmetric:
        return arrays
    return arrays | {"data": (arrays["data"].view(np.uint8) ^ _TOP_BITS[scheme.bits]).view(dtype)}
