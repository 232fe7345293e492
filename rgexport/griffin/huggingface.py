"""Reads and writes the weights of a model folder in Hugging Face's layout."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.safetensors import FLOATS, header, read_header
from rgexport.files.typed_json import read_json
from rgexport.griffin.tensor import FoundTensor, RowTensor, WeightSource, entry_rows
from rgexport.progress import task

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
_PLAIN_NAME = re.compile(r"[^./\\][^/\\]*")
PREFIX = "model."
SHARD_BYTES = 3_000_000_000
SLAB_BYTES = 8 << 20


def find_shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Returns the weight files of a folder, and its index's map from tensor to file."""
    if (folder / SINGLE).exists():
        return (folder / SINGLE,), None
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".safetensors"})
        hint = f", only {', '.join(others[:3])}" if others else ""
        raise RequestError(
            f"{folder} has no weights{hint}; expected {SINGLE}, {INDEX} or a DeepMind .pt"
        )
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        # A path could lead to any file of the user.
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise RequestError(
                f"{index} maps tensor {name} to {file!r}; expected a file name in the folder"
            )
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise RequestError(
            f"{folder} has no {', '.join(missing)}, which {INDEX} names; copy or download it again"
        )
    return tuple(folder / file for file in files), weight_map


def read_tensors(folder: Path) -> tuple[dict[str, FoundTensor], tuple[str, ...], tuple[Path, ...]]:
    """Returns the tensors of a folder by canonical names, index problems, and weight files.

    A saved head has the name `lm_head.weight`.
    """
    files, weight_map = find_shards(folder)
    tensors: dict[str, FoundTensor] = {}
    problems: list[str] = []
    for path in files:
        for name, entry in read_header(path).items():
            canonical = name.removeprefix(PREFIX)
            if weight_map is not None and weight_map.get(name) != path.name:
                problems.append(
                    f"unexpected: {name} in {path.name}, where {INDEX} does not place it"
                )
            elif canonical in tensors:
                problems.append(f"unexpected: {name}, a second {canonical}")
            else:
                tensors[canonical] = entry_rows(entry) if entry.dtype in FLOATS else entry.dtype
    if weight_map is not None:
        stray = sorted(set(folder.glob("model-*-of-*.safetensors")) - set(files))
        problems += [f"unexpected: {path.name}, which {INDEX} does not name" for path in stray]
    return tensors, tuple(problems), files


def write_weights(folder: Path, weights: WeightSource, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the weights into `folder`: one file, or shards of at most `shard_bytes` and an index.

    A tensor that is larger gets a shard of its own. Names get the hub's prefix `model.`.
    """
    shards = list(_split(weights, shard_bytes))
    total, count = sum(tensor.nbytes for tensor in weights.values()), len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = [SINGLE]
    with task("Writing the weights", total) as advance:
        for name, shard in zip(files, shards, strict=True):
            arrays = {PREFIX + n: (tensor.dtype, tensor.shape) for n, tensor in shard.items()}
            with (folder / name).open("wb") as file:
                file.write(header(arrays, {"format": "pt"}))
                for tensor in shard.values():
                    for _, rows in tensor.slabs(SLAB_BYTES):
                        file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
                        advance(rows.nbytes)
    if count > 1:
        pairs = zip(files, shards, strict=True)
        weight_map = {PREFIX + name: file for file, shard in pairs for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _split(weights: WeightSource, limit: int) -> Iterator[WeightSource]:
    """Yields the weights in order, in groups of at most `limit` bytes or of one tensor."""
    shard: dict[str, RowTensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
