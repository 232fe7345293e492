"""GGUF files, those that are artifacts, and importance matrices of both formats."""

import struct
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader

from fuzz.readers import gguf_mutator, json_mutator, small
from fuzz.readers.shown import shown
from fuzz.readers.target import Target, oracle, require
from rgexport.artifacts.describe import describe
from rgexport.artifacts.gguf import integrity
from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_file
from rgexport.quantize.gguf_header import GgufHeader, read_header
from rgexport.quantize.imatrix import Imatrix, read_imatrix

Answer = Any


def _write(writer: gguf.GGUFWriter, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _seeds(folder: Path) -> Iterable[bytes]:
    folder.mkdir()
    path = folder / "some.gguf"
    writer = gguf.GGUFWriter(path, "some")
    writer.add_array("tokens", ["a", "bc", "ü"])
    writer.add_array("scores", [0.5, 1.0])
    writer.add_array("types", [1, 2, 3])
    writer.add_float32("eps", 1e-6)
    writer.add_bool("yes", True)
    writer.add_uint64("long", 1 << 40)
    writer.add_int8("small", -3)
    arrays = {
        "a": np.ones((2, 32), np.float32),
        "b": np.arange(5, dtype=np.float16),
        "c": np.ones((1, 2, 3), np.float32),
    }
    _write(writer, arrays)
    yield path.read_bytes()
    _write(gguf.GGUFWriter(path, "none"), {})
    yield path.read_bytes()


def _place(data: bytes, folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return path


def _read_header(data: bytes, folder: Path) -> GgufHeader:
    return read_header(_place(data, folder, "file.gguf"))


def _agree_on_header(data: bytes, folder: Path, header: GgufHeader) -> None:
    """Names, shapes, types and bytes as gguf-py has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = oracle(lambda: GGUFReader(header.path), "gguf-py refuses the file")
    found = {tensor.name: tensor for tensor in theirs.tensors}
    require(found.keys() == header.tensors.keys(), "other tensors than gguf-py has")
    for name, tensor in header.tensors.items():
        other = found[name]
        shape = tuple(int(size) for size in other.shape[::-1])
        require(shape == tensor.shape, "another shape than gguf-py has", name)
        require(int(other.tensor_type) == tensor.type.value, "another type than gguf-py has", name)
        content = data[tensor.offset : tensor.offset + tensor.nbytes]
        require(content == other.data.tobytes(), "other bytes than gguf-py has", name)
    for key, value in header.values.items():
        require(_same(value, theirs.fields[key]), "another value than gguf-py has", key)


def _same(value: Any, field: Any) -> bool:
    if field.types[0] != gguf.GGUFValueType.ARRAY:
        other = field.contents()
        return bool(value == other or (value != value and other != other))
    if isinstance(value, list):
        return bool(value == field.contents())
    if not len(field.data):  # gguf-py tells nothing of an empty array
        return not len(value)
    return bool(
        np.array_equal(value, np.array(field.contents()), equal_nan=value.dtype.kind == "f")
    )


def _artifact_seeds(folder: Path) -> Iterable[bytes]:
    from rgexport.export.gguf.exporter import export_gguf
    from rgexport.export.gguf.options import GgufOptions
    from rgexport.griffin.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(small.write_model(folder / "model"))
    for word in ("f32", "f16"):
        target = folder / f"{word}.gguf"
        yield export_gguf(checkpoint, GgufOptions(type=word), target).read_bytes()


def _mutate_artifact(data: bytes, random: Random) -> bytes:
    """Often changes what the manifest says."""
    if random.randrange(3):
        return gguf_mutator.mutate(data, random)
    try:
        parts = gguf_mutator.take_apart(data)
    except ValueError:
        return gguf_mutator.mutate(data, random)
    keys = {integrity.MANIFEST_KEY.encode(), integrity.CHECK.encode()}
    for at, (key, kind, value) in enumerate(parts.values):
        if key in keys and random.randrange(2):
            text = json_mutator.mutate(value[8:], random)
            parts.values[at] = key, kind, struct.pack("<Q", len(text)) + text
    return gguf_mutator.put_together(parts)


def _read_artifact(data: bytes, folder: Path) -> Answer:
    """As `inspect` and `validate` do, of a file whose hashes were made to fit."""
    path = _place(data, folder, "file.gguf")
    _seal(path)
    artifact = open_artifact(path)
    weights = {name: rows.whole() for name, rows in artifact.weights.items()}
    found = describe(str(path))
    return artifact, weights, shown(found, data)


def _seal(path: Path) -> None:
    """Computes the hashes of an altered file anew, where it still has places for them.

    Where it has none, the reader that is tested refuses it.
    """
    with suppress(RequestError, KeyError, ValueError, OSError):
        header = read_header(path)
        types = integrity.types_sha256((n, t.type.name) for n, t in header.tensors.items())
        with path.open("r+b") as file:
            file.seek(header.spans[integrity.TYPES][1] - len(types))
            file.write(types.encode())
        integrity.seal(path, hash_file(path, start=integrity.data_start(header)).sha256)


def _agree_on_artifact(data: bytes, folder: Path, answer: Answer) -> None:
    artifact, weights, text = answer
    header = artifact.header
    _agree_on_header(header.path.read_bytes(), folder, header)
    require(all(c.isprintable() or c == "\n" for c in text), "text that a terminal would obey")
    expected = {name: stored.shape for name, stored in artifact.manifest.tensors.items()}
    require({n: a.shape for n, a in weights.items()} == expected, "weights of other shapes")
    config = artifact.manifest.config
    numbers = [v for v in config.to_dict().values() if isinstance(v, int | float)]
    require(all(0 <= v < 1e31 for v in numbers), "a configuration of impossible numbers", numbers)


def _imatrix_seeds(folder: Path) -> Iterable[bytes]:
    folder.mkdir()
    path = folder / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    arrays = {}
    for name, count in (("blk.0.attn_q.weight", 1), ("blk.1.ffn_up.weight", 2)):
        arrays[f"{name}.in_sum2"] = np.ones((count, 8), np.float32)
        arrays[f"{name}.counts"] = np.full((count, 1), 4, np.float32)
    _write(writer, arrays)
    yield path.read_bytes()


def _read_imatrix(data: bytes, folder: Path) -> Imatrix:
    imatrix = read_imatrix(_place(data, folder, "file.imatrix"))
    imatrix.metadata()
    return imatrix


def _agree_on_imatrix(data: bytes, folder: Path, imatrix: Imatrix) -> None:
    theirs = _gguf_means(imatrix.path)
    require(theirs.keys() == imatrix.entries.keys(), "other entries than the oracle has")
    for name, values in imatrix.entries.items():
        same = np.allclose(values, theirs[name], rtol=1e-5, atol=1e-37)
        require(
            values.shape == theirs[name].shape and same, "other values than the oracle has", name
        )


def _gguf_means(path: Path) -> dict[str, np.ndarray]:
    """With gguf-py, and as llama.cpp's imatrix-loader.cpp has it."""
    tensors = {t.name: t for t in oracle(lambda: GGUFReader(path), "gguf-py refuses it").tensors}
    means = {}
    for name in (key.removesuffix(".in_sum2") for key in tensors if key.endswith(".in_sum2")):
        sums = tensors[f"{name}.in_sum2"].data.reshape(-1).astype(np.float64)
        counts = tensors[f"{name}.counts"].data.reshape(-1)
        size = len(sums) // len(counts)
        for at, count in enumerate(np.rint(counts)):
            part = sums[at * size : (at + 1) * size]
            part[:] = part / count if count > 0 else 1.0
        means[name] = sums
    return means


TARGETS = {
    "gguf": Target("gguf", _seeds, gguf_mutator.mutate, _read_header, _agree_on_header, 1 << 13),
    "gguf_artifact": Target(
        "gguf_artifact", _artifact_seeds, _mutate_artifact, _read_artifact, _agree_on_artifact
    ),
    "imatrix": Target(
        "imatrix", _imatrix_seeds, gguf_mutator.mutate, _read_imatrix, _agree_on_imatrix, 1 << 13
    ),
}
