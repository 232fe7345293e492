"""llama.cpp's serialized state of one sequence, and the canonical state in it.

The layout is private to llama.cpp (`state_write` in src/llama-kv-cache.cpp and
src/llama-memory-recurrent.cpp, commit 0c1e570); `llama_cpp_library` refuses any other release.
Whatever is not as expected here is named: a layout that drifted is not misread. With
`LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY`, little-endian:

    u32 magic, i32 sequence
    sliding-window cache:
      u32 streams; for each: u32 cells, and if there are some:
        for each cell: i32 position, u32 1, i32 sequence
        u32 values transposed, u32 layers
        for each layer: i32 type, u64 bytes of a row, rows of keys
        for each layer: i32 type, u64 bytes of a row, rows of values
          or, transposed: i32 type, u32 bytes of an item, u32 columns, columns of values
    recurrent memory:
      u32 cells; for each cell: i32 position, u32 0
      u32 0, u32 layers of the model
      for each recurrent layer: i32 type, u64 bytes, inputs of the convolution
        [lru_width, conv_width - 1], oldest first
      for each recurrent layer: i32 type, u64 bytes, state of the RG-LRU [lru_width]
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import POSITION, State

MAGIC = 0xAF143CD8
TYPES = {"float32": 0, "float16": 1}
"""dtype → `enum ggml_type` (ggml.h)."""

_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


@dataclass(frozen=True)
class Layout:
    """What a context's states look like.

    Attributes:
        config: the model.
        cache_type: dtype of keys and values.
        transposed: whether values are stored by column, as they are without flash attention.
        streams: sequences that the context can hold.
    """

    config: GriffinConfig
    cache_type: str
    transposed: bool
    streams: int

    @property
    def attention_layers(self) -> list[int]:
        """Their indices."""
        return [i for i, kind in enumerate(self.config.block_types) if kind == "attention"]

    @property
    def recurrent_layers(self) -> list[int]:
        """Their indices."""
        return [i for i, kind in enumerate(self.config.block_types) if kind == "recurrent"]


def unpack(data: bytes, layout: Layout) -> State:
    """The canonical state of one sequence that has seen at least one token, without a batch axis.

    Raises:
        RequestError: llama.cpp lays out states otherwise than we know.
    """
    reader = _Reader(data)
    reader.expect("the magic number", "<I", MAGIC)
    reader.take("<i")
    state = _read_cache(reader, layout) | _read_recurrent(reader, layout)
    reader.expect_end()
    return state


def pack(state: State, layout: Layout) -> bytes:
    """The inverse of `unpack`, with the cells in the order of their positions.

    Keys and values in front of the first token are left out, as llama.cpp has no cells for them.
    """
    position = int(state[POSITION])
    parts = [struct.pack("<Ii", MAGIC, 0), *_write_cache(state, layout, position)]
    return b"".join([*parts, *_write_recurrent(state, layout, position)])


class _Reader:
    """Reads a state from front to back and refuses what is not as expected."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, form: str) -> int:
        """One number."""
        (value,) = struct.unpack(form, self._bytes(struct.calcsize(form)))
        return int(value)

    def expect(self, what: str, form: str, expected: int) -> None:
        """One number that we know."""
        found = self.take(form)
        if found != expected:
            raise _drifted(f"{what} is {found:#x}; expected {expected:#x}")

    def array(self, dtype: np.dtype | str, shape: tuple[int, ...]) -> np.ndarray:
        """An array, read-only."""
        kind = np.dtype(dtype)
        return np.frombuffer(
            self._bytes(kind.itemsize * int(np.prod(shape, dtype=np.int64))), kind
        ).reshape(shape)

    def expect_end(self) -> None:
        """Nothing is left."""
        if self._at != len(self._data):
            raise _drifted(f"{len(self._data) - self._at} bytes are left over")

    def _bytes(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) != count:
            raise _drifted(f"it ends after {len(self._data)} bytes")
        self._at += count
        return part


def _drifted(what: str) -> RequestError:
    return RequestError(
        f"llama.cpp's state is not laid out as this rgexport knows it: {what}; "
        "install the llama.cpp that `rgexport llama-cpp build` makes"
    )


def _read_cache(reader: _Reader, layout: Layout) -> State:
    reader.expect("the number of streams", "<I", layout.streams)
    state: State = {}
    for _ in range(layout.streams):
        if cells := reader.take("<I"):
            state = _read_cells(reader, layout, cells)
    if not state:
        raise _drifted("there are no cells")
    return state


def _read_cells(reader: _Reader, layout: Layout, cells: int) -> State:
    config, layers = layout.config, layout.attention_layers
    meta = reader.array(_CELL, (cells,))
    if (meta["sequences"] != 1).any():
        raise _drifted("a cell has another number of sequences than 1")
    order = np.argsort(meta["position"])[-config.window :]
    positions = meta["position"][order]
    if (np.diff(positions) != 1).any():
        raise _drifted("the cells' positions do not follow one another")
    reader.expect("whether values are transposed", "<I", layout.transposed)
    reader.expect("the number of attention layers", "<I", len(layers))
    keys = {f"layers.{i}.key": _read_rows(reader, layout, cells) for i in layers}
    read_values = _read_columns if layout.transposed else _read_rows
    values = {f"layers.{i}.value": read_values(reader, layout, cells) for i in layers}
    padded = {name: _padded(rows[order], config.window) for name, rows in (keys | values).items()}
    return padded | {POSITION: np.array(positions[-1] + 1, np.int64)}


def _padded(rows: np.ndarray, window: int) -> np.ndarray:
    return np.concatenate([np.zeros((window - len(rows), rows.shape[1]), rows.dtype), rows])


def _read_rows(reader: _Reader, layout: Layout, cells: int) -> np.ndarray:
    width, dtype = layout.config.head_dim, np.dtype(layout.cache_type)
    reader.expect("the type of keys and values", "<i", TYPES[layout.cache_type])
    reader.expect("the bytes of a key or value", "<Q", width * dtype.itemsize)
    return reader.array(dtype, (cells, width))


def _read_columns(reader: _Reader, layout: Layout, cells: int) -> np.ndarray:
    width, dtype = layout.config.head_dim, np.dtype(layout.cache_type)
    reader.expect("the type of values", "<i", TYPES[layout.cache_type])
    reader.expect("the bytes of an item of values", "<I", dtype.itemsize)
    reader.expect("the columns of values", "<I", width)
    return reader.array(dtype, (width, cells)).T


def _read_recurrent(reader: _Reader, layout: Layout) -> State:
    config = layout.config
    reader.expect("the number of recurrent cells", "<I", 1)
    reader.take("<i")
    reader.expect("the sequences of a recurrent cell", "<I", 0)
    reader.expect("whether recurrent states are transposed", "<I", 0)
    reader.expect("the number of layers", "<I", config.num_layers)
    conv = (config.lru_width, config.conv_width - 1)
    state: State = {}
    for i in layout.recurrent_layers:
        state[f"layers.{i}.conv1d"] = _read_float(reader, "convolution", conv).T
    for i in layout.recurrent_layers:
        state[f"layers.{i}.rg_lru"] = _read_float(reader, "RG-LRU", (config.lru_width,))
    return state


def _read_float(reader: _Reader, what: str, shape: tuple[int, ...]) -> np.ndarray:
    reader.expect(f"the type of the {what}'s state", "<i", TYPES["float32"])
    reader.expect(f"the bytes of the {what}'s state", "<Q", 4 * int(np.prod(shape)))
    return reader.array("<f4", shape)


def _write_cache(state: State, layout: Layout, position: int) -> Iterator[bytes]:
    config, layers = layout.config, layout.attention_layers
    cells = np.zeros(min(position, config.window), _CELL)
    cells["position"], cells["sequences"] = np.arange(position - len(cells), position), 1
    yield struct.pack("<II", layout.streams, len(cells))
    yield cells.tobytes()
    yield struct.pack("<II", layout.transposed, len(layers))
    dtype = np.dtype(layout.cache_type)
    kind, row = TYPES[layout.cache_type], config.head_dim * dtype.itemsize

    def stored(name: str) -> np.ndarray:
        return state[name][config.window - len(cells) :].astype(dtype)

    for i in layers:
        yield struct.pack("<iQ", kind, row) + stored(f"layers.{i}.key").tobytes()
    for i in layers:
        values = stored(f"layers.{i}.value")
        if layout.transposed:
            yield struct.pack("<iII", kind, dtype.itemsize, config.head_dim)
            yield np.ascontiguousarray(values.T).tobytes()
        else:
            yield struct.pack("<iQ", kind, row) + values.tobytes()
    yield struct.pack(f"<{layout.streams - 1}I", *[0] * (layout.streams - 1))


def _write_recurrent(state: State, layout: Layout, position: int) -> Iterator[bytes]:
    config = layout.config
    yield struct.pack("<IiIII", 1, position - 1, 0, 0, config.num_layers)
    for i in layout.recurrent_layers:
        yield _stored_float(state[f"layers.{i}.conv1d"].T)
    for i in layout.recurrent_layers:
        yield _stored_float(state[f"layers.{i}.rg_lru"])


def _stored_float(array: np.ndarray) -> bytes:
    data = np.ascontiguousarray(array, np.float32).tobytes()
    return struct.pack("<iQ", TYPES["float32"], len(data)) + data
