"""Reads the weights of a model folder in Hugging Face's layout."""

import re
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.griffin.json_fields import read_json
from rgexport.griffin.safetensors_file import FLOATS, read_header
from rgexport.griffin.tensor import FoundTensor

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
_PLAIN_NAME = re.compile(r"[^./\\][^/\\]*")
PREFIX = "model."


def find_shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """Returns the weight files of a folder, and its index's map from tensor to file.

    Raises:
        RequestError: there are none, or the index is wrong or names files that are not there.
    """
    if (folder / SINGLE).exists():
        return (folder / SINGLE,), None
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".safetensors"})
        hint = f", only {', '.join(others[:3])}" if others else ""
        raise RequestError(
            f"{folder} has no weights{hint}; expected {SINGLE}, {INDEX} or a DeepMind .pt"
        )
    index = read_json(folder / INDEX)
    weight_map = index.object("weight_map").values
    if not weight_map:
        raise RequestError(f"{index.where} has no weight_map")
    for name, file in weight_map.items():
        # A path could lead to any file of the user.
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise RequestError(
                f"{index.where} maps tensor {name} to {file!r}; expected a file name in the folder"
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
                tensors[canonical] = entry.rows() if entry.dtype in FLOATS else entry.dtype
    if weight_map is not None:
        stray = sorted(set(folder.glob("model-*-of-*.safetensors")) - set(files))
        problems += [f"unexpected: {path.name}, which {INDEX} does not name" for path in stray]
    return tensors, tuple(problems), files
