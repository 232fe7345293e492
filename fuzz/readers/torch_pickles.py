"""DeepMind's `.pt` files, of which nothing must run."""

import io
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.readers import pickle_mutator
from fuzz.readers.target import Target, oracle, require
from rgexport.griffin.tensor import DeepMindTensor, DeepMindTensors
from rgexport.griffin.torch_file import read_torch_file

MODEL = "model.pt"


def _seeds(folder: Path) -> Iterable[bytes]:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    trees: tuple[dict[str, Any], ...] = (
        {"a": values, "b": values.bfloat16()[1:], "c": torch.ones(3, dtype=torch.int64)},
        {"params": {"x": values, "same": values, "inner": {"y": values.half()}}, "step": 3},
        {"empty": torch.zeros(0, 2), "scalar": torch.tensor(1.5), "list": [1, "two"]},
    )
    for tree in trees:
        buffer = io.BytesIO()
        torch.save(tree, buffer)
        yield buffer.getvalue()


def _read(data: bytes, folder: Path) -> DeepMindTensors:
    folder.mkdir(exist_ok=True)
    path = folder / MODEL
    path.write_bytes(data)
    return read_torch_file(path)


def _agree(data: bytes, folder: Path, tensors: DeepMindTensors) -> None:
    """Compares names, shapes, dtypes and bytes with those that torch loads."""
    content = oracle(
        lambda: torch.load(_rewritten(data), map_location="cpu", weights_only=True), "torch refuses"
    )
    theirs = dict(_flatten(content))
    require(theirs.keys() == tensors.keys(), "other names than torch has")
    for name, tensor in tensors.items():
        loaded = theirs[name]
        is_tensor = isinstance(tensor, DeepMindTensor)
        require(isinstance(loaded, torch.Tensor) == is_tensor, "no tensor", name)
        if isinstance(tensor, DeepMindTensor):
            require(tuple(loaded.shape) == tensor.shape, "another shape than torch has", name)
            require(
                str(loaded.dtype) == f"torch.{tensor.dtype}", "another dtype than torch has", name
            )
            if tensor.shape:
                expected = loaded.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                require(tensor.rows().whole().tobytes() == expected, "other bytes than torch", name)


def _rewritten(data: bytes) -> io.BytesIO:
    """The records that are read, in an archive that is otherwise as torch writes it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (pickled,) = (i for i in archive.infolist() if i.filename.endswith("/data.pkl"))
        name = pickled.filename.removesuffix("/data.pkl")
        kept = [i for i in archive.infolist() if i.filename.startswith(f"{name}/data/")]
        for info in kept:
            info.CRC = None  # type: ignore[assignment]  # neither reader looks at it
        records = {info.filename: archive.read(info) for info in (*kept, pickled)}
    records |= {f"{name}/version": b"3\n", f"{name}/byteorder": b"little"}
    return io.BytesIO(
        pickle_mutator.zip_of([(n, c, zipfile.ZIP_STORED) for n, c in records.items()])
    )


def _flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _mutate(data: bytes, random: Random) -> bytes:
    return pickle_mutator.mutate(data, random)


TARGETS = {"pt": Target("pt", _seeds, _mutate, _read, _agree, 1 << 14)}
