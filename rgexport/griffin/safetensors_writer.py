"""Writes safetensors files, sharded as the hub does it, in slabs."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rgexport.files.safetensors import header
from rgexport.griffin.huggingface import INDEX, PREFIX, SINGLE
from rgexport.griffin.tensor import RowTensor, WeightSource
from rgexport.progress import Advance, task

SHARD_BYTES = 3_000_000_000
SLAB_BYTES = 8 << 20


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
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


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
        arrays = {PREFIX + name: (each.dtype, each.shape) for name, each in weights.items()}
        file.write(header(arrays, {"format": "pt"}))
        for tensor in weights.values():
            for _, rows in tensor.slabs(SLAB_BYTES):
                file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
                advance(rows.nbytes)
