"""State files: the state of a model after a text, to go on with in any engine.

A safetensors file. Its arrays are the canonical states (`griffin.state`) of one conversation
without a batch axis, in float32, or in float16 except `rg_lru`; and `tokens`, int32 [N], or only
their hash, `tokens_sha256`, uint8 [32]. The state has seen all tokens, or all but the last: going
on needs a token that the state has not seen, or the `logits` after the last one, float32 [vocab].
The metadata have one JSON object, `StateHeader`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rgexport._version import __version__
from rgexport.artifacts.manifest import Identity
from rgexport.chat.prompts import Message
from rgexport.errors import RequestError
from rgexport.files.atomic import write_file
from rgexport.files.kinds import read_typed_metadata
from rgexport.files.paths import report_os_errors
from rgexport.files.safetensors import Entry, has_metadata, header, read_header
from rgexport.files.targets import require_writable
from rgexport.files.typed_json import to_json
from rgexport.griffin.state import POSITION, State

Key = tuple[int, str]
"""Number of tokens, and their SHA-256 as int32, little-endian."""

METADATA = "rgexport.state"
FORMAT_VERSION = 2
TOKENS, TOKENS_SHA256, LOGITS = "tokens", "tokens_sha256", "logits"
PRECISIONS = {"fp32": "float32", "fp16": "float16"}
"""Precision of a file → dtype of its states."""
_ALWAYS_FLOAT32 = ".rg_lru"
_STATE_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
_OTHER_DTYPES: dict[str, dict[str, np.dtype[Any]]] = {
    TOKENS: {"I32": np.dtype(np.int32)},
    TOKENS_SHA256: {"U8": np.dtype(np.uint8)},
    LOGITS: {"F32": np.dtype(np.float32)},
}
"""Array that is no state → its dtype, in the file and in NumPy."""


@dataclass(frozen=True, kw_only=True)
class StateHeader:
    """The metadata of a file; `sha256` is the hash of its arrays."""

    format_version: int
    identity: Identity
    tokens: int
    position: int
    has_text: bool
    messages: list[dict[str, str]] | None
    engine: str
    artifact: str = ""
    tool: str
    sha256: str


@dataclass(frozen=True, repr=False)
class SavedState:
    """A state of batch 1, the tokens before it, and its model.

    Attributes:
        key: key of the tokens that the state has seen.
        tokens: int64 [N], which the state has seen, perhaps except the last one; None if only
            the key is known.
        artifact: a hash of everything that its bits depend on; empty if that is unknown.
    """

    identity: Identity
    key: Key
    state: State
    tokens: np.ndarray | None = None
    messages: Sequence[Message] | None = None
    engine: str = ""
    logits: np.ndarray | None = None
    artifact: str = ""

    def __repr__(self) -> str:
        return f"<SavedState {self.identity.name}: {self.count:,} tokens>"

    @property
    def position(self) -> int:
        return self.key[0]

    @property
    def count(self) -> int:
        return self.position if self.tokens is None else len(self.tokens)


def state_bytes(state: State, logits: np.ndarray | None) -> int:
    arrays = [*state.values(), *([] if logits is None else [logits])]
    return sum(array.nbytes for array in arrays)


def in_namespace(key: Key, namespace: str) -> Key:
    """Returns the key in a namespace, which does not reveal the keys in other namespaces."""
    if not namespace:
        return key
    return key[0], hashlib.sha256(f"{namespace}:{key[1]}".encode()).hexdigest()


def key_of(ids: Sequence[int] | np.ndarray) -> Key:
    (key,) = keys_of(ids, [len(ids)])
    return key


def keys_of(ids: Sequence[int] | np.ndarray, lengths: Iterable[int]) -> list[Key]:
    """Returns the keys of prefixes of rising lengths, hashed in one pass."""
    data, digest, start, keys = np.array(ids, "<i4"), hashlib.sha256(), 0, list[Key]()
    for length in lengths:
        digest.update(data[start:length].tobytes())
        start = length
        keys.append((length, digest.hexdigest()))
    return keys


def require_precision(precision: str | None) -> None:
    if precision not in (None, *PRECISIONS):
        expected = " or ".join(PRECISIONS)
        raise RequestError(f"the precision of states is {precision!r}; expected {expected}")


def require_replaceable(path: Path) -> None:
    require_writable(path)
    if os.path.lexists(path) and not (path.is_file() and is_state_file(path)):
        raise RequestError(f"{path} exists and is not a state file; give another name")


is_state_file = partial(has_metadata, METADATA)


def write_state(path: Path, saved: SavedState, *, precision: str | None = None) -> int:
    """Writes a file that appears complete or not at all; returns its size.

    `precision` is one of `PRECISIONS`, None for the engine's. Raises RequestError if it cannot.
    """
    return write_chunks(path, file_chunks(saved, precision))


def write_chunks(path: Path, chunks: Sequence[memoryview]) -> int:
    with report_os_errors(path, "write"):
        write_file(path, chunks)
    return sum(chunk.nbytes for chunk in chunks)


def file_chunks(saved: SavedState, precision: str | None = None) -> list[memoryview]:
    arrays = _stored(saved, precision)
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.data)
    fields = StateHeader(
        format_version=FORMAT_VERSION,
        identity=saved.identity,
        tokens=saved.count,
        position=saved.position,
        has_text=saved.tokens is not None,
        messages=None if saved.messages is None else [dict(m) for m in saved.messages],
        engine=saved.engine,
        artifact=saved.artifact,
        tool=f"rgexport {__version__}",
        sha256=digest.hexdigest(),
    )
    text = json.dumps(to_json(fields))
    begin = header({n: (a.dtype, a.shape) for n, a in arrays.items()}, {METADATA: text})
    return [memoryview(begin), *(array.data for array in arrays.values())]


def read_state(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> SavedState:
    """Reads a file of a model with these `shapes`, without batch; RequestError for another one."""
    fields, entries = read_state_header(path), read_header(path)
    if dict(shapes) != {n: entry.shape for n, entry in entries.items() if n not in _OTHER_DTYPES}:
        raise RequestError(
            f"{path} is a state of {fields.identity.name}, whose states have other shapes; "
            "load it with an artifact of that model"
        )
    arrays = _read_arrays(path, fields, entries)
    tokens, sha256, logits = (arrays.pop(name, None) for name in _OTHER_DTYPES)
    position = fields.position
    if tokens is not None:
        key = key_of(tokens[:position])
    else:
        assert sha256 is not None, "checked by `_is_consistent`"
        key = position, sha256.tobytes().hex()
    state: State = {name: array[None] for name, array in arrays.items()}
    return SavedState(
        fields.identity,
        key,
        state | {POSITION: np.array([position], np.int64)},
        None if tokens is None else tokens.astype(np.int64),
        fields.messages,
        fields.engine,
        logits,
        fields.artifact,
    )


def require_intact(path: Path) -> None:
    _read_arrays(path, read_state_header(path), read_header(path))


def read_state_header(path: Path) -> StateHeader:
    """Returns the metadata of a file, if it is a state file of this version."""
    state_header = read_typed_metadata(path, METADATA, StateHeader, FORMAT_VERSION)
    if any(not m.keys() >= {"role", "content"} for m in state_header.messages or ()):
        raise RequestError(f"{path} is damaged: in its metadata, a message lacks role or content")
    return state_header


def require_same_model(path: Path, saved: SavedState, expected: Identity) -> None:
    """Raises RequestError for another model, window or, for a conversation, chat template."""
    actual = saved.identity
    if actual.weights != expected.weights:
        difference = f"the model {actual.name} with other weights"
    elif actual.window != expected.window:
        difference = f"a window of {actual.window} tokens"
    elif saved.messages is not None and actual.template != expected.template:
        difference = f"another chat template of {actual.name}"
    else:
        return
    raise RequestError(
        f"{path} is a state of {difference}; this artifact is {expected.name} with a window of "
        f"{expected.window}: load it with the artifact of its own model"
    )


def _read_arrays(
    path: Path, fields: StateHeader, entries: Mapping[str, Entry]
) -> dict[str, np.ndarray]:
    digest, arrays = hashlib.sha256(), dict[str, np.ndarray]()
    with report_os_errors(path), path.open("rb") as file:
        for name, entry in entries.items():
            dtypes = _OTHER_DTYPES.get(name, _STATE_DTYPES)
            if entry.dtype not in dtypes:
                shape = list(entry.shape)
                raise RequestError(f"{path} is damaged: {name} is {entry.dtype} {shape}")
            file.seek(entry.offset)
            data = file.read(entry.nbytes)
            digest.update(data)
            arrays[name] = np.frombuffer(data, dtypes[entry.dtype]).reshape(entry.shape)
    if digest.hexdigest() != fields.sha256 or not _is_consistent(fields, arrays):
        raise RequestError(f"{path} is damaged: its contents do not have the hash that it names")
    return arrays


def _is_consistent(fields: StateHeader, arrays: Mapping[str, np.ndarray]) -> bool:
    count, position = fields.tokens, fields.position
    shapes = {name: arrays[name].shape for name in _OTHER_DTYPES if name in arrays}
    if len(shapes.pop(LOGITS, (0,))) != 1:
        return False
    if fields.has_text:
        unseen = count - position
        return shapes == {TOKENS: (count,)} and unseen in (0, 1) and position >= 0
    has_only_hash = shapes == {TOKENS_SHA256: (32,)} and fields.messages is None
    return has_only_hash and count == position >= 0


def _stored(saved: SavedState, precision: str | None) -> dict[str, np.ndarray]:
    require_precision(precision)
    if saved.tokens is not None:
        arrays = {TOKENS: np.asarray(saved.tokens, np.int32)}
    else:
        arrays = {TOKENS_SHA256: np.frombuffer(bytes.fromhex(saved.key[1]), np.uint8)}
    for name, array in saved.state.items():
        if name != POSITION:
            dtype = array.dtype if precision is None else np.dtype(PRECISIONS[precision])
            if name.endswith(_ALWAYS_FLOAT32):
                dtype = np.dtype(np.float32)
            arrays[name] = np.ascontiguousarray(array[0], dtype)
    if saved.logits is not None:
        arrays[LOGITS] = np.ascontiguousarray(saved.logits, np.float32)
    return arrays
