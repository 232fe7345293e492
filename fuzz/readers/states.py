"""State files, which travel between machines and engines."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from fuzz.readers.references import mutate_hashed
from fuzz.readers.target import Target, oracle, require
from rgexport.chat.state_file import (
    LOGITS,
    METADATA,
    TOKENS,
    TOKENS_SHA256,
    Identity,
    SavedState,
    key_of,
    read_state,
    write_state,
)
from rgexport.griffin.state import POSITION

SHAPES = {"layers.0.rg_lru": (4,), "layers.0.conv1d": (3, 4), "layers.1.key": (2, 2)}
_IDENTITY = Identity("a", "0" * 64, 2, "0" * 64)


def _seeds(folder: Path) -> Iterable[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: np.ones((1, *shape), np.float32) for name, shape in SHAPES.items()}
    talk = [{"role": "user", "content": "hello"}]
    ids = np.arange(4)
    sealed = SavedState(_IDENTITY, key_of(ids), state | {POSITION: np.array([4], np.int64)})
    for logits in (None, np.ones(3, np.float32)):
        write_state(folder / "a.state", replace(sealed, logits=logits, artifact="an artifact"))
        yield (folder / "a.state").read_bytes()
    for count, messages, precision in ((3, None, None), (9, talk, "fp16")):
        seen = state | {POSITION: np.array([count - 1], np.int64)}
        ids = np.arange(count)
        saved = SavedState(_IDENTITY, key_of(ids[:-1]), seen, ids, messages, "an engine")
        write_state(folder / "a.state", saved, precision=precision)
        yield (folder / "a.state").read_bytes()


def _read(data: bytes, folder: Path) -> SavedState:
    folder.mkdir(exist_ok=True)
    path = folder / "a.state"
    path.write_bytes(data)
    return read_state(path, SHAPES)


def _agree(data: bytes, folder: Path, found: SavedState) -> None:
    """With the safetensors package, and with the rules that engines rely on."""
    arrays = oracle(lambda: load(data), "safetensors refuses it")
    text = {TOKENS, TOKENS_SHA256}
    logits = arrays.pop(LOGITS, None)
    require((found.logits is None) == (logits is None), "it has other logits")
    require(arrays.keys() - text == {*SHAPES}, "it has other arrays", arrays.keys())
    require(len(arrays.keys() & text) == 1, "it has not one of tokens and hash", arrays.keys())
    require((found.tokens is None) == (TOKENS not in arrays), "it has other tokens")
    if found.tokens is not None:
        require(found.tokens.tolist() == arrays[TOKENS].tolist(), "it has other tokens")
    for name, array in arrays.items():
        if name not in text:
            same = np.array_equal(found.state[name][0], array, equal_nan=True)
            require(same, "it has other values", name)
    require(found.count - found.position in (0, 1), "its position fits no tokens")


TARGETS = {
    "state": Target(
        "state",
        _seeds,
        partial(mutate_hashed, metadata=METADATA, digest="sha256"),
        _read,
        _agree,
    )
}
