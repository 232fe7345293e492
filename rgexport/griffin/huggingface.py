"""Reads and writes the weight files of a model folder in Hugging Face's layout."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.files import typed_json
from rgexport.files.safetensors import FLOATS, Entry, header, read_header
from rgexport.griffin.tensor import FoundTensor, RowTensor, WeightSource, entry_rows
from rgexport.progress import task

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

HEAD = "lm_head.weight"
"""The head, which some checkpoints store beside the embedding that it equals."""
PREFIX = "model."
"""The start of a tensor's name in files, before its canonical name."""

SHARD_BYTES = 3_000_000_000
"""Most bytes of tensors in one written file."""
SLAB_BYTES = 8 << 20
"""Bytes that are written at a time, and reported as progress."""

_PLAIN_NAME = re.compile(r"[^./\\][^/\\]*")


def find_shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Returns the weight files of a folder, and its index's map from tensor to file.

    Raises:
        RequestError: there are no weights, the index is wrong, or a file that it names is missing.
    """
    if (folder / SINGLE).exists():
        return (folder / SINGLE,), None
    if not (folder / INDEX).exists():
        raise RequestError(
            f"{folder} has no weights{_hint(folder)}; expected {SINGLE}, {INDEX} or a DeepMind .pt"
        )

    weight_map = _read_weight_map(folder / INDEX)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise RequestError(
            f"{folder} has no {', '.join(missing)}, which {INDEX} names; copy or download it again"
        )
    return tuple(folder / file for file in files), weight_map


def _hint(folder: Path) -> str:
    """Returns what the folder has instead of weights, for an error message."""
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".safetensors"})
    if (folder / "rgexport.json").is_file():
        return " to read: it is an artifact"
    if others:
        return f", only {', '.join(others[:3])}"
    return ""


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = typed_json.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        # A path could lead to any file of the user.
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise RequestError(
                f"{index} maps tensor {name} to {file!r}; expected a file name in the folder"
            )
    return weight_map


def read_tensors(folder: Path) -> tuple[dict[str, FoundTensor], tuple[str, ...], tuple[Path, ...]]:
    """Returns the tensors of a folder by canonical names, index problems, and weight files."""
    files, weight_map = find_shards(folder)
    tensors: dict[str, FoundTensor] = {}
    problems: list[str] = []
    for path in files:
        gaps: list[str] = []
        for name, entry in read_header(path, gaps).items():
            canonical = name.removeprefix(PREFIX)
            if weight_map is not None and weight_map.get(name) != path.name:
                problems.append(
                    f"unexpected: {name} in {path.name}, where {INDEX} does not place it"
                )
            elif canonical in tensors:
                problems.append(f"unexpected: {name}, a second {canonical}")
            else:
                tensors[canonical] = _found_tensor(entry)
        problems += [f"unexpected: {gap}" for gap in gaps]

    if weight_map is not None:
        stray = sorted(set(folder.glob("model-*-of-*.safetensors")) - set(files))
        problems += [f"unexpected: {path.name}, which {INDEX} does not name" for path in stray]
    return tensors, tuple(problems), files


def _found_tensor(entry: Entry) -> FoundTensor:
    if entry.dtype in FLOATS:
        return entry_rows(entry)
    return entry.dtype


def write_weights(folder: Path, weights: WeightSource, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes one file, or shards of at most `shard_bytes` (but a tensor at least) and an index."""
    shards = list(_split(weights, shard_bytes))
    files = _shard_names(len(shards))
    total = sum(tensor.nbytes for tensor in weights.values())

    with task("Writing the weights", total) as advance:
        for name, shard in zip(files, shards, strict=True):
            arrays = {PREFIX + n: (tensor.dtype, tensor.shape) for n, tensor in shard.items()}
            with (folder / name).open("wb") as file:
                file.write(header(arrays, {"format": "pt"}))
                for tensor in shard.values():
                    for _, rows in tensor.slabs(SLAB_BYTES):
                        values = np.ascontiguousarray(rows).reshape(-1)
                        file.write(values.view(np.uint8).data)
                        advance(rows.nbytes)

    if len(shards) > 1:
        _write_index(folder, files, shards, total)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _write_index(
    folder: Path, files: list[str], shards: list[WeightSource], total_bytes: int
) -> None:
    weight_map: dict[str, str] = {}
    for file, shard in zip(files, shards, strict=True):
        for name in shard:
            weight_map[PREFIX + name] = file
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, "utf-8")


def _split(weights: WeightSource, limit: int) -> Iterator[WeightSource]:
    """Yields the weights in shards of at most `limit` bytes, but with one tensor at least."""
    shard: dict[str, RowTensor] = {}
    size = 0
    for name, tensor in weights.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard = {}
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
