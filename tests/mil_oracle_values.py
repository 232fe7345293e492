"""What a saved .mlpackage holds, read from its files: types, immediate values, blobs of weights."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.proto import MIL_pb2

from tests.mil_oracle_ops import demand

Type = tuple[str, tuple[int, ...]]
"""dtype, such as `fp16`, and shape."""

NUMPY = {"fp16": np.float16, "fp32": np.float32, "bool": np.bool_}
_NAMES = {"FLOAT16": "fp16", "FLOAT32": "fp32", "STRING": "str"}
_DTYPES = {number: _NAMES.get(name, name.lower()) for name, number in MIL_pb2.DataType.items()}
_FIELDS = {"fp32": "floats", "int32": "ints", "int16": "ints", "uint16": "ints", "bool": "bools"}
_BLOB_DTYPES = {1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 8: "int4", 11: "uint4", 14: "int32"}
_WEIGHTS = "@model_path/"


def model_file(package: Path) -> Path:
    """The program, by the package's Manifest.json; every file that this names must be there."""
    manifest = json.loads((package / "Manifest.json").read_text())
    entries = manifest["itemInfoEntries"]
    for entry in entries.values():
        demand((package / "Data" / entry["path"]).exists(), f"{entry['path']} is missing")
    return package / "Data" / entries[manifest["rootModelIdentifier"]]["path"]


def read_type(proto: Any) -> Type:
    """A ValueType of a tensor of fixed shape."""
    demand(proto.WhichOneof("type") == "tensorType", "not a tensor")
    tensor = proto.tensorType
    shape = tuple(int(dimension.constant.size) for dimension in tensor.dimensions)
    demand(tensor.rank == len(shape) <= 5, f"rank {tensor.rank} with {len(shape)} dimensions")
    demand(all(size > 0 for size in shape), f"shape {shape}")
    return _DTYPES[tensor.dataType], shape


def read_value(proto: Any, folder: Path) -> np.ndarray:
    """A Value, which is in the program or in a file of `folder`; 4-bit integers come unpacked."""
    dtype, shape = read_type(proto.type)
    if proto.WhichOneof("value") == "blobFileValue":
        return _unpacked(_blob(proto.blobFileValue, dtype, folder), dtype, shape)
    tensor = proto.immediateValue.tensor
    field = tensor.WhichOneof("value")
    # float16 and integers of at most 8 bits are bytes
    expected = "strings" if dtype == "str" else _FIELDS.get(dtype, "bytes")
    demand(field == expected, f"{dtype} in {field}, not in {expected}")
    values = getattr(tensor, field).values
    if field == "bytes":
        return _unpacked(values, dtype, shape)
    count = int(np.prod(shape, dtype=np.int64))
    demand(len(values) == count, f"{len(values)} values of {count}")
    return np.array(list(values)).reshape(shape)


def _blob(place: Any, dtype: str, folder: Path) -> bytes:
    """The bytes that the header at a place in the file of weights describes."""
    demand(place.fileName.startswith(_WEIGHTS), f"weights in {place.fileName}")
    with (folder / place.fileName.removeprefix(_WEIGHTS)).open("rb") as file:
        file.seek(place.offset)
        sentinel, code, size, offset, _ = struct.unpack("<IIQQQ", file.read(32))
        demand(sentinel == 0xDEADBEEF, f"no blob at {place.offset}")
        demand(_BLOB_DTYPES.get(code) == dtype, f"blob of type {code}, declared {dtype}")
        demand(offset == place.offset + 64, f"data at {offset}, header at {place.offset}")
        file.seek(offset)
        data = file.read(size)
    demand(len(data) == size, "the weight file ends inside a blob")
    return data


def _unpacked(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    if not dtype.endswith("int4"):
        stored = np.dtype(NUMPY.get(dtype) or dtype)
        demand(len(data) == count * stored.itemsize, f"{len(data)} bytes for {count} {dtype}")
        return np.frombuffer(data, stored).reshape(shape)
    demand(len(data) == (count + 1) // 2, f"{len(data)} bytes for {count} {dtype}")
    pairs = np.frombuffer(data, np.uint8)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1)[:count].reshape(shape)
    if dtype == "uint4":
        return nibbles
    return np.where(nibbles < 8, nibbles, nibbles.astype(np.int8) - 16).astype(np.int8)
