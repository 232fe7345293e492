"""Small artifacts of every kind, exported from one checkpoint, and ways to spoil them."""

import dataclasses
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rgexport.artifacts.artifact import record_files
from rgexport.artifacts.gguf.integrity import data_start, seal
from rgexport.artifacts.manifest import write_manifest
from rgexport.artifacts.manifest_reader import read_manifest
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.files.hashing import hash_file
from rgexport.griffin.checkpoint import open_checkpoint
from rgexport.quantize.gguf_header import read_header
from tests.artifacts import copy_cached
from tests.models import make_config, random_weights, write_hugging_face

CONFIG = make_config("rra", width=64, heads=4, lru_width=96, vocab_size=300)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "original"
    return write_hugging_face(CONFIG, random_weights(CONFIG), folder, dtype="bfloat16")


@pytest.fixture(scope="session")
def clean(checkpoint):
    """The artifact of a kind such as `int4-exact`, exported once."""

    def export(kind: str) -> Path:
        target, (word, _, exact) = checkpoint.parent / kind, kind.partition("-")
        block = 32 if kind == "int4" else None
        options = OnnxOptions(precision=word, exact=bool(exact), block_size=block)
        source, key = open_checkpoint(checkpoint), f"validate {CONFIG} {options}"
        if not target.exists():
            copy_cached(key, lambda artifact: export_onnx(source, options, artifact), target)
        return target

    return export


@pytest.fixture
def spoil(clean, tmp_path):
    """A copy of an artifact that was altered and looks intact: its hashes are made anew."""

    def copy(kind, *, config=None, weight=None) -> Path:
        folder = Path(shutil.copytree(clean(kind), tmp_path / "spoiled"))
        if weight is not None:
            name, gain = weight
            stored = read_manifest(folder).tensors[name].parts["data"]
            layout = {"dtype": stored.dtype, "offset": stored.offset, "shape": stored.shape}
            values = np.memmap(folder / stored.file, mode="r+", **layout)
            values[:] = values * np.asarray(gain, values.dtype)
            values.flush()
        manifest = read_manifest(folder)
        changed = dataclasses.replace(manifest.config, **(config or {}))
        write_manifest(folder, dataclasses.replace(manifest, config=changed))
        claim(folder)
        return folder

    return copy


def claim(path: Path) -> None:
    """Makes the hashes of a folder or a GGUF file fit what is there."""
    if path.is_file():
        seal(path, hash_file(path, start=data_start(read_header(path))).sha256)
    else:
        write_manifest(path, dataclasses.replace(read_manifest(path), files=record_files(path)))


def at(key: str, value: float, index: int = -1) -> Callable[[Path], object]:
    """Sets an item of a key's value in a GGUF file, counted from its end."""
    item = struct.pack({float: "<f", bool: "?"}.get(type(value), "<I"), value)

    def edit(path: Path) -> None:
        data, start = path.read_bytes(), read_header(path).spans[key][1] + index * len(item)
        path.write_bytes(data[:start] + item + data[start + len(item) :])

    return edit
