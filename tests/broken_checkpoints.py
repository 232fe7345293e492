"""Broken checkpoints, each with a pattern of its error message."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.deepmind import write_deepmind
from tests.models import edit_header, make_config, random_weights, write_hugging_face

CONFIG = make_config("ra", width=32, heads=2, mlp_width=48, vocab_size=64)
WEIGHTS = random_weights(CONFIG)
LINEAR = "layers.0.mlp_block.gate_proj.weight"


def save(folder: Path) -> None:
    write_hugging_face(CONFIG, WEIGHTS, folder)


def then(make: Callable[[Path], object], spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        make(folder)
        spoil(folder)

    return both


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return then(save, lambda folder: edit_header(folder, change))


def truncate(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = next(folder.glob(name))
        os.truncate(path, path.stat().st_size - 10)

    return cut


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: next(folder.glob(name)).unlink()


def sharded(folder: Path) -> None:
    write_hugging_face(CONFIG, WEIGHTS, folder, shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2


BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated file": (then(save, truncate("model.safetensors")), "model.safetensors"),
    "missing shard": (then(sharded, remove("*-00002-*")), "00002-of"),
    "index is no JSON": (then(sharded, put("model.safetensors.index.json", b"{")), "index.json"),
    "name that a terminal obeys": (
        edited(lambda h: h.update({"\x1b[2J\x1b]0;x\x07": {"dtype": "F99"}})),
        r"tensor \\u001b\[2J\\u001b\]0;x\\u0007, shape is missing",
    ),
    "name without an end": (edited(lambda h: h.update({"x" * 9999: {}})), r"xxx \.\.\. xxx"),
    "no config": (then(save, remove("config.json")), "config.json"),
    "empty folder": (lambda folder: None, "model"),
    "config alone": (then(save, remove("model.safetensors")), "model"),
}


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("exploded",)


def pickle_with_code(folder: Path) -> None:
    write_deepmind(WEIGHTS, folder)
    source, target = folder / "model.pt", folder / "bad.zip"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = pickle.dumps(Bomb()) if item.filename.endswith("data.pkl") else old.read(item)
            new.writestr(item.filename, data)
    target.replace(source)


BROKEN_PT: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle with code": (pickle_with_code, "model.pt"),
    "bare pickle with code": (put("model.pt", pickle.dumps(Bomb())), "model.pt"),
    "missing tensor": (
        lambda f: write_deepmind({n: w for n, w in WEIGHTS.items() if n != LINEAR}, f),
        "ffw_up|gate_proj|missing",
    ),
}
