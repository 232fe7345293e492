"""Writes safetensors files, sharded as the hub does it, in slabs."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rgexport.griffin.huggingface import INDEX, PREFIX, SINGLE
from rgexport.griffin.safetensors_file import FLOATS
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.progress import Advance, task

SHARD_BYTES = 3_000_000_000
SLAB_BYTES = 8 << 20

_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def write_weights(folder: Path, weights: WeightSource, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the weights into `folder`: one file, or shards of at most `shard_bytes` and an index.

    A tensor that is larger than `shard_bytes` gets a shard of its own. Names get the hub's
    prefix `model.`.
    """
    shards = list(_split(weights, shard_bytes))
    total = sum(tensor.nbytes for tensor in weights.values())
    count = len(shards)
    files = [SINGLE] if count == 1 else [_shard_name(i, count) for i in range(1, count + 1)]
    with task("Writing the weights", total) as advance:
        for file, shard in zip(files, shards, strict=True):
            _write_file(folder / file, shard, advance)
    if count > 1:
        places = zip(files, shards, strict=True)
        weight_map = {PREFIX + name: file for file, shard in places for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shard_name(index: int, count: int) -> str:
    return f"model-{index:05}-of-{count:05}.safetensors"


def _split(weights: WeightSource, limit: int) -> Iterator[WeightSource]:
    """The weights in order, in groups of at most `limit` bytes, at least one tensor each."""
    shard: dict[str, RowTensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_file(path: Path, weights: WeightSource, advance: Advance) -> None:
    with path.open("wb") as file:
        file.write(_header(weights))
        for tensor in weights.values():
            for _, rows in tensor.slabs(SLAB_BYTES):
                file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
                advance(rows.nbytes)


def _header(weights: WeightSource) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in weights.items():
        fields[PREFIX + name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text
