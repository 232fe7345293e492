"""Safetensors files, alone and as the weights of a checkpoint."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from fuzz.readers import bytes_mutator as raw
from fuzz.readers import folders, json_mutator, small
from fuzz.readers.shown import shown
from fuzz.readers.target import Target, oracle, require
from rgexport.artifacts.describe import describe
from rgexport.files.safetensors import FLOATS, Entry, read_header, read_metadata
from rgexport.griffin.tensor import entry_rows

_DTYPES = ("F32", "F16", "BF16", "F4", "F6_E2M3", "F8_E4M3", "BOOL", "I64", "U8", "C64", "E9")


def mutate_safetensors(data: bytes, random: Random) -> bytes:
    """Mostly changes the header, and tells its true length."""
    choice = random.randrange(10)
    length = int.from_bytes(data[:8], "little")
    if choice == 0 or len(data) < 8 + length:
        return raw.flip(data, random)
    header, content = data[8 : 8 + length], data[8 + length :]
    if choice == 1:
        content = raw.flip(content, random)
    elif choice < 5:
        header = _change_tensor(header, random)
    else:
        header = json_mutator.mutate(header, random)
    stated = raw.number(len(header), random) if choice == 2 else len(header)
    return struct.pack("<Q", stated & ((1 << 64) - 1)) + header + content


def _change_tensor(header: bytes, random: Random) -> bytes:
    """Other dtypes, shapes and places that fit one another."""
    try:
        fields = json.loads(header)
        name = random.choice([key for key in fields if key != "__metadata__"])
        entry = fields[name]
        begin, end = entry["data_offsets"]
        match random.randrange(5):
            case 0:
                entry["dtype"] = random.choice(_DTYPES)
            case 1:
                entry["shape"] = random.choice(
                    (
                        [],
                        [0],
                        [0, 1 << 62],
                        [1 << 32, 1 << 32, 0],
                        [*entry["shape"], 1],
                        [end - begin],
                    )
                )
            case 2:
                entry["shape"] = [1 << random.randrange(64)] * random.randrange(200)
            case 3:
                entry["data_offsets"] = [
                    random.choice((0, begin, end)),
                    random.choice((begin, end)),
                ]
            case _:
                fields["__metadata__"] = random.choice(({}, {"a": 1}, [], None, {"a": "b"}, "a"))
        return json.dumps(fields).encode()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return json_mutator.mutate(header, random)


def _seeds(folder: Path) -> Iterable[bytes]:
    arrays = {
        "model.a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((2, 2, 1), np.float16),
        "c": np.arange(3, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    yield save(arrays, {"format": "pt"})
    yield save({"x": np.ones(1, np.float32)})
    yield save({})


def _read_file(data: bytes, folder: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(data)
    found = read_header(path), read_metadata(path)
    for entry in found[0].values():
        if entry.dtype in FLOATS and entry.shape:
            entry_rows(entry).whole()
    return found


def _agree_on_file(data: bytes, folder: Path, found: tuple[dict[str, Entry], Any]) -> None:
    tensors = dict(oracle(lambda: safetensors.deserialize(data), "safetensors refuses the file"))
    require(found[0].keys() == tensors.keys(), "other tensors than safetensors has")
    for name, entry in found[0].items():
        theirs = tensors[name]
        same = (entry.dtype, list(entry.shape)) == (theirs["dtype"], theirs["shape"])
        require(same, "another dtype or shape than safetensors has", name)
        content = data[entry.offset : entry.offset + entry.nbytes]
        require(content == bytes(theirs["data"]), "other bytes than safetensors has", name)
    path = folder / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        require((file.metadata() or {}) == found[1], "other metadata than safetensors has")


def mutate_folder(data: bytes, random: Random) -> bytes:
    """Changes one file of a checkpoint, or what files there are."""
    files = folders.unpack(data)
    if not files:
        return data
    name = random.choice(list(files))
    entry = files[name]
    if random.randrange(12) == 0:
        change_folder(files, name, random)
    elif name.endswith(".safetensors"):
        files[name] = folders.Entry(mutate_safetensors(entry.content, random))
    elif name.endswith((".json", ".jinja")):
        files[name] = folders.Entry(json_mutator.mutate(entry.content, random))
    return folders.pack(files)


def change_folder(files: folders.Files, name: str, random: Random) -> None:
    """Takes a file away, or puts a link, a pipe or a folder in its place."""
    targets = (name, ".", "/dev/zero", "/dev/stdin", "/etc/passwd", "nowhere", "../" * 20)
    match random.randrange(5):
        case 0:
            del files[name]
        case 1:
            files[name] = folders.Entry(random.choice(targets).encode(), folders.LINK)
        case 2:
            files[name] = folders.Entry(b"", folders.PIPE)
        case 3:
            files[f"{name}/inside"] = files.pop(name)
        case _:
            files[f"model-0000{random.randrange(4)}-of-00002.safetensors"] = files[name]


def _checkpoint_seeds(folder: Path) -> Iterable[bytes]:
    for number, (dtype, shards) in enumerate((("bfloat16", False), ("float32", True))):
        model = small.write_model(folder / str(number), dtype=dtype, shards=shards)
        yield folders.pack(folders.files_in(model))


def _read_checkpoint(data: bytes, folder: Path) -> dict[str, Any]:
    folders.place(data, folder)
    found = describe(str(folder), verify=True)
    shown(found, data)
    return found


def _agree_on_checkpoint(data: bytes, folder: Path, found: dict[str, Any]) -> None:
    """Each tensor is there in one of the files, with that shape, and holds what is told."""
    theirs: dict[str, list[int]] = {}
    for name in found["files"]:
        with oracle(
            lambda name=name: safetensors.safe_open(folder / name, "numpy"),
            "safetensors refuses it",
        ) as file:
            theirs |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    for name, tensor in found["tensors"].items():
        shapes = theirs.get(f"model.{name}", theirs.get(name))
        require(shapes == tensor["shape"], "another shape than safetensors has", name)
    whole = found["config"]["vocab_size"], found["config"]["width"]
    embedding = found["tensors"].get("embed_tokens.weight", {}).get("shape", list(whole))
    require(embedding == list(whole), "an embedding of another size than the configuration has")


TARGETS = {
    "safetensors": Target("safetensors", _seeds, mutate_safetensors, _read_file, _agree_on_file),
    "checkpoint": Target(
        "checkpoint", _checkpoint_seeds, mutate_folder, _read_checkpoint, _agree_on_checkpoint
    ),
}
