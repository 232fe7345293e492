"""Reads the weights of a model folder in Hugging Face's layout."""

import re
from pathlib import Path

from rgexport.errors import RequestError
from rgexport.files.safetensors import FLOATS, Entry, read_header
from rgexport.files.typed_json import read_json
from rgexport.griffin.file_rows import entry_rows
from rgexport.griffin.inventory import FoundTensor

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
_PLAIN_NAME = re.compile(r"[^./\\][^/\\]*")
PREFIX = "model."


def find_shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weight files of a folder, and the index's map from tensor to file, if it has one.

    Raises:
        RequestError: there are none, or the index is wrong or names files that are not there.
    """
    if (folder / SINGLE).exists():
        return (folder / SINGLE,), None
    if not (folder / INDEX).exists():
        raise RequestError(_no_weights(folder))
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


def _no_weights(folder: Path) -> str:
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".safetensors"})
    hint = f", only {', '.join(others[:3])}" if others else ""
    return f"{folder} has no weights{hint}; expected {SINGLE}, {INDEX} or a DeepMind .pt"


def read_tensors(folder: Path) -> tuple[dict[str, FoundTensor], tuple[str, ...], tuple[Path, ...]]:
    """The tensors of a folder by canonical names, problems of its index, its weight files.

    A saved head has the name `lm_head.weight`.
    """
    files, weight_map = find_shards(folder)
    found: dict[str, FoundTensor] = {}
    problems: list[str] = []
    for path in files:
        for name, entry in read_header(path).items():
            canonical = name.removeprefix(PREFIX)
            if weight_map is not None and weight_map.get(name) != path.name:
                problems.append(
                    f"unexpected: {name} in {path.name}, where {INDEX} does not place it"
                )
            elif canonical in found:
                problems.append(f"unexpected: {name}, a second {canonical}")
            else:
                found[canonical] = _tensor(entry)
    if weight_map is not None:
        stray = sorted(set(folder.glob("model-*-of-*.safetensors")) - set(files))
        problems += [f"unexpected: {path.name}, which {INDEX} does not name" for path in stray]
    return found, tuple(problems), files


def _tensor(entry: Entry) -> FoundTensor:
    return entry_rows(entry) if entry.dtype in FLOATS else entry.dtype
