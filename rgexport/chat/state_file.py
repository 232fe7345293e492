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
"""Key of the JSON object in the file's metadata."""

FORMAT_VERSION = 2

TOKENS = "tokens"
TOKENS_SHA256 = "tokens_sha256"
LOGITS = "logits"

PRECISIONS = {"fp32": "float32", "fp16": "float16"}
"""Precision of a file → dtype of its states."""

_ALWAYS_FLOAT32 = ".rg_lru"
"""End of the names of states that no precision shortens."""

_STATE_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
_OTHER_DTYPES: dict[str, dict[str, np.dtype[Any]]] = {
    TOKENS: {"I32": np.dtype(np.int32)},
    TOKENS_SHA256: {"U8": np.dtype(np.uint8)},
    LOGITS: {"F32": np.dtype(np.float32)},
}
"""Array that is no state → its dtype, in the file and in NumPy."""


@dataclass(frozen=True, kw_only=True)
class StateHeader:
    """The metadata of a file.

    Attributes:
        tokens: number of tokens of the text.
        position: number of tokens that the state has seen.
        has_text: whether the file has the tokens, or only their hash.
        engine: name and version of the engine that computed the state.
        artifact: a hash of everything that its bits depend on; empty if that is unknown.
        sha256: hash of its arrays.
    """

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
        logits: float32 [vocab] after the last token that the state has seen.
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
        """The number of tokens that the state has seen."""
        return self.key[0]

    @property
    def count(self) -> int:
        """The number of tokens of the text."""
        return self.position if self.tokens is None else len(self.tokens)


def state_bytes(state: State, logits: np.ndarray | None) -> int:
    """Returns the size of a state, and of logits, in bytes."""
    nbytes = sum(array.nbytes for array in state.values())
    if logits is not None:
        nbytes += logits.nbytes
    return nbytes


def in_namespace(key: Key, namespace: str) -> Key:
    """Returns the key in a namespace, which does not reveal the keys in other namespaces."""
    if not namespace:
        return key
    length, digest = key
    return length, hashlib.sha256(f"{namespace}:{digest}".encode()).hexdigest()


def key_of(ids: Sequence[int] | np.ndarray) -> Key:
    """Returns the key of a text."""
    (key,) = keys_of(ids, [len(ids)])
    return key


def keys_of(ids: Sequence[int] | np.ndarray, lengths: Iterable[int]) -> list[Key]:
    """Returns the keys of prefixes of rising lengths, hashed in one pass."""
    data = np.array(ids, "<i4")
    digest = hashlib.sha256()
    keys: list[Key] = []
    start = 0
    for length in lengths:
        digest.update(data[start:length].tobytes())
        keys.append((length, digest.hexdigest()))
        start = length
    return keys


def require_precision(precision: str | None) -> None:
    """Raises RequestError unless it is one of `PRECISIONS`, or None for the engine's."""
    if precision not in (None, *PRECISIONS):
        expected = " or ".join(PRECISIONS)
        raise RequestError(f"the precision of states is {precision!r}; expected {expected}")


def require_replaceable(path: Path) -> None:
    """Raises RequestError if a path cannot be written, or exists and is not a state file."""
    require_writable(path)
    if os.path.lexists(path) and not (path.is_file() and is_state_file(path)):
        raise RequestError(f"{path} exists and is not a state file; give another name")


def is_state_file(path: Path) -> bool:
    """Returns whether a file has the metadata of a state file, of any version."""
    return has_metadata(METADATA, path)


def write_state(path: Path, saved: SavedState, *, precision: str | None = None) -> int:
    """Writes a file that appears complete or not at all; returns its size.

    `precision` is one of `PRECISIONS`, None for the engine's. Raises RequestError if it cannot.
    """
    return write_chunks(path, file_chunks(saved, precision))


def write_chunks(path: Path, chunks: Sequence[memoryview]) -> int:
    """Writes the bytes of a state file; returns their number.

    Raises RequestError for errors of the system.
    """
    with report_os_errors(path, "write"):
        write_file(path, chunks)
    return sum(chunk.nbytes for chunk in chunks)


def file_chunks(saved: SavedState, precision: str | None = None) -> list[memoryview]:
    """Returns the bytes of a state file: its header, then its arrays without copies."""
    arrays = _stored_arrays(saved, precision)
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.data)

    messages = None
    if saved.messages is not None:
        messages = [dict(message) for message in saved.messages]
    fields = StateHeader(
        format_version=FORMAT_VERSION,
        identity=saved.identity,
        tokens=saved.count,
        position=saved.position,
        has_text=saved.tokens is not None,
        messages=messages,
        engine=saved.engine,
        artifact=saved.artifact,
        tool=f"rgexport {__version__}",
        sha256=digest.hexdigest(),
    )
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    text = json.dumps(to_json(fields))
    begin = header(layout, {METADATA: text})
    return [memoryview(begin), *(array.data for array in arrays.values())]


def read_state(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> SavedState:
    """Reads a file of a model with these `shapes`, without batch; RequestError for another one."""
    fields = read_state_header(path)
    entries = read_header(path)
    _require_shapes(path, fields, entries, shapes)

    arrays = _read_arrays(path, fields, entries)
    tokens = arrays.pop(TOKENS, None)
    sha256 = arrays.pop(TOKENS_SHA256, None)
    logits = arrays.pop(LOGITS, None)
    if tokens is not None:
        key = key_of(tokens[: fields.position])
        tokens = tokens.astype(np.int64)
    else:
        assert sha256 is not None, "checked by `_is_consistent`"
        key = fields.position, sha256.tobytes().hex()

    state: State = {name: array[None] for name, array in arrays.items()}
    state[POSITION] = np.array([fields.position], np.int64)
    return SavedState(
        fields.identity,
        key,
        state,
        tokens,
        fields.messages,
        fields.engine,
        logits,
        fields.artifact,
    )


def require_intact(path: Path) -> None:
    """Raises RequestError if a state file is damaged."""
    _read_arrays(path, read_state_header(path), read_header(path))


def read_state_header(path: Path) -> StateHeader:
    """Returns the metadata of a file, if it is a state file of this version."""
    state_header = read_typed_metadata(path, METADATA, StateHeader, FORMAT_VERSION)
    for message in state_header.messages or ():
        if not message.keys() >= {"role", "content"}:
            raise RequestError(
                f"{path} is damaged: in its metadata, a message lacks role or content"
            )
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


def _require_shapes(
    path: Path,
    fields: StateHeader,
    entries: Mapping[str, Entry],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    shapes = {name: entry.shape for name, entry in entries.items() if name not in _OTHER_DTYPES}
    if shapes != dict(expected):
        raise RequestError(
            f"{path} is a state of {fields.identity.name}, whose states have other shapes; "
            "load it with an artifact of that model"
        )


def _read_arrays(
    path: Path, fields: StateHeader, entries: Mapping[str, Entry]
) -> dict[str, np.ndarray]:
    """Returns the arrays of a file; RequestError if they are damaged, or lack what they need."""
    digest = hashlib.sha256()
    arrays: dict[str, np.ndarray] = {}
    with report_os_errors(path), path.open("rb") as file:
        for name, entry in entries.items():
            dtypes = _OTHER_DTYPES.get(name, _STATE_DTYPES)
            if entry.dtype not in dtypes:
                shape = list(entry.shape)
                raise RequestError(f"{path} is damaged: {name} is {entry.dtype} {shape}")
            file.seek(entry.offset)
            data = file.read(entry.nbytes)
            digest.update(data)
            array = np.frombuffer(data, dtypes[entry.dtype])
            arrays[name] = array.reshape(entry.shape)
    if digest.hexdigest() != fields.sha256 or not _is_consistent(fields, arrays):
        raise RequestError(f"{path} is damaged: its contents do not have the hash that it names")
    return arrays


def _is_consistent(fields: StateHeader, arrays: Mapping[str, np.ndarray]) -> bool:
    """Returns whether the arrays that are no states have the shapes that the metadata imply."""
    count = fields.tokens
    position = fields.position
    if LOGITS in arrays and arrays[LOGITS].ndim != 1:
        return False
    shapes = {name: arrays[name].shape for name in (TOKENS, TOKENS_SHA256) if name in arrays}
    if fields.has_text:
        unseen = count - position
        return shapes == {TOKENS: (count,)} and unseen in (0, 1) and position >= 0
    has_only_hash = shapes == {TOKENS_SHA256: (32,)} and fields.messages is None
    return has_only_hash and count == position >= 0


def _stored_arrays(saved: SavedState, precision: str | None) -> dict[str, np.ndarray]:
    """Returns the arrays of a file, in their order: tokens or hash, states, logits."""
    require_precision(precision)
    if saved.tokens is not None:
        arrays = {TOKENS: np.asarray(saved.tokens, np.int32)}
    else:
        _, digest = saved.key
        arrays = {TOKENS_SHA256: np.frombuffer(bytes.fromhex(digest), np.uint8)}
    for name, array in saved.state.items():
        if name != POSITION:
            dtype = _stored_dtype(name, array, precision)
            arrays[name] = np.ascontiguousarray(array[0], dtype)
    if saved.logits is not None:
        arrays[LOGITS] = np.ascontiguousarray(saved.logits, np.float32)
    return arrays


def _stored_dtype(name: str, array: np.ndarray, precision: str | None) -> np.dtype[Any]:
    if name.endswith(_ALWAYS_FLOAT32):
        return np.dtype(np.float32)
    if precision is None:
        return array.dtype
    return np.dtype(PRECISIONS[precision])
