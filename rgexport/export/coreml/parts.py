"""Rows of a weight as the parts that a package stores, and back.

Two's complement is what MIL has where `quantize.affine` counts from -2^(bits-1) up: its symmetric
data differ from it by the top bit. The parts' shapes are those of `layouts`.
"""

import numpy as np

from rgexport.export.manifest import StoredTensor
from rgexport.export.transforms import DECAY, NORM, PLAIN, Transform
from rgexport.quantize import affine, algorithms, palette
from rgexport.quantize.affine import Parts
from rgexport.quantize.scheme import Affine, Palette

_TOP_BITS = {4: np.uint8(0x88), 8: np.uint8(0x80)}


def transform_of(name: str) -> Transform:
    """What is done to the values of the tensor `name`."""
    if name.endswith("norm.weight"):
        return NORM
    return DECAY if name.endswith(".recurrent_param") else PLAIN


def encode(name: str, rows: np.ndarray, stored: StoredTensor) -> Parts:
    """Rows of a checkpoint as they are stored.

    Raises:
        RequestError: a weight that its scheme cannot hold.
    """
    values = transform_of(name).store(rows.astype(np.float32, copy=False))
    parts, scheme = algorithms.encode(name, values, stored.scheme), stored.scheme
    if isinstance(scheme, Affine):
        return _with_sign(parts, scheme, stored.parts["data"].dtype)
    return parts


def decode(name: str, parts: Parts, stored: StoredTensor) -> np.ndarray:
    """The inverse of `encode`: float32 [rows, columns]."""
    columns = int(np.prod(stored.shape[1:], dtype=np.int64))
    scheme = stored.scheme
    if isinstance(scheme, Affine):
        rows = affine.decode(_with_sign(parts, scheme, "uint8"), scheme, columns)
    elif isinstance(scheme, Palette):
        rows = palette.decode(parts, scheme, columns)
    else:
        rows = parts["data"]
    return transform_of(name).restore(rows.astype(np.float32, copy=False))


def _with_sign(parts: Parts, scheme: Affine, dtype: str) -> Parts:
    if not scheme.symmetric:
        return parts
    return parts | {"data": (parts["data"].view(np.uint8) ^ _TOP_BITS[scheme.bits]).view(dtype)}
