"""Reads the weights of packages: the parts of tensors in MIL blob files, and their values.

A blob file (version 2, as in MIL's C++ `StorageFormat.hpp`) begins with a header of 64 bytes. The
blobs follow at multiples of 64, each with its own header of 64 bytes. MIL has two's complement
where `quantize.schemes.affine` counts from -2^(bits-1) up: symmetric data differ in the top bit.
"""

import struct

import numpy as np

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.storage import part_shapes_by_group
from rgexport.artifacts.transforms import DECAY, NORM, PLAIN, Transform
from rgexport.errors import RequestError
from rgexport.griffin.layer_ops import Role
from rgexport.griffin.layout import role_of
from rgexport.quantize.schemes import registry as schemes

ALIGNMENT = 64
"""A blob's header begins at a multiple of this."""

BLOB_HEADER = struct.Struct("<IIQQQ32x")
"""Sentinel, dtype, bytes of the data, their offset in the file, bits of padding."""

BLOB_HEADER_BYTES = BLOB_HEADER.size
"""A program has the offset of a blob's header; the data follow it."""

SIGNED = {4: "uint8", 8: "int8"}
"""Bits → dtype of integers in two's complement; two of 4 bits are a byte."""

_TOP_BITS = {4: np.uint8(0x88), 8: np.uint8(0x80)}
"""Bits → byte with the top bit of each integer."""

_TRANSFORMS: dict[Role, Transform] = {"norm": NORM, "a_param": DECAY}


def transform_of(name: str) -> Transform:
    """Returns the transform with which a tensor is stored."""
    role = role_of(name)
    return _TRANSFORMS.get(role, PLAIN)


def part_shapes(shape: tuple[int, ...], scheme: schemes.Scheme) -> schemes.PartShapes:
    """Returns the parts of a scheme, signed where symmetric; raises RequestError for others."""
    for uniform in scheme.uniform:
        if not _is_storable(shape, uniform):
            raise RequestError(
                f"{scheme.label} is a way to store {list(shape)} that Core ML does not have"
            )
    return part_shapes_by_group(shape, scheme, _group_part_shapes)


def _is_storable(shape: tuple[int, ...], scheme: schemes.Uniform) -> bool:
    if not scheme.is_quantized:
        return not scheme.is_gguf_only
    return scheme.has_mil_op and len(shape) == 2 and scheme.fitted(shape) == scheme


def _group_part_shapes(shape: tuple[int, ...], scheme: schemes.Uniform) -> schemes.PartShapes:
    shapes = scheme.part_shapes(shape)
    bits = scheme.symmetric_bits
    if bits is not None:
        _, data_shape = shapes["data"]
        shapes["data"] = (SIGNED[bits], data_shape)
    return shapes


def decode(name: str, arrays: schemes.Parts, stored: StoredTensor) -> np.ndarray:
    """Returns rows of a tensor or row group as float32, as the checkpoint has them."""
    scheme = stored.uniform
    columns = int(np.prod(stored.shape[1:], dtype=np.int64))
    unsigned = with_sign(arrays, scheme, "uint8")
    rows = scheme.decode(unsigned, columns)
    if scheme.scale_dtype is not None:
        rows = rows.astype(scheme.scale_dtype)  # engines multiply in the dtype of the scales

    rows = rows.astype(np.float32, copy=False)
    transform = transform_of(name)
    return transform.restore(rows)


def with_sign(arrays: schemes.Parts, scheme: schemes.Uniform, dtype: str) -> schemes.Parts:
    """Converts symmetric data between two's complement and integers from -2^(bits-1) up.

    Both directions flip the top bit of each integer. `dtype` names the dtype of the result.
    """
    bits = scheme.symmetric_bits
    if bits is None:
        return arrays

    data = arrays["data"].view(np.uint8)
    flipped = data ^ _TOP_BITS[bits]
    return arrays | {"data": flipped.view(dtype)}
