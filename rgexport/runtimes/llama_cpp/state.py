"""llama.cpp's serialized state of one sequence, and the canonical state in it.

The layout is private to llama.cpp (`state_write` in src/llama-kv-cache.cpp and
src/llama-memory-recurrent.cpp, commit 0c1e570); `runtimes.llama_cpp.library` refuses any other
release. A state with another size or another fixed number is refused, not misread. With
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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import POSITION, State

MAGIC = 0xAF143CD8
TYPES = {"float32": 0, "float16": 1}
"""dtype → `enum ggml_type` (ggml.h)."""

_CELLS_AT = 12  # where the streams' numbers of cells begin
_CELL = [("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")]
_NOT_FIXED = {"position", "sequence", "data"}
_HEADERS: dict[str, Callable[[np.ndarray], int]] = {
    "type": lambda data: TYPES[data.dtype.name],
    "row_bytes": lambda data: data[0, 0].nbytes,
    "item_bytes": lambda data: data.itemsize,
    "columns": lambda data: data.shape[1],
    "bytes": lambda data: data[0].nbytes,
}
"""Number before a tensor → its value for the tensor's data [1, ...]."""


@dataclass(frozen=True)
class StateLayout:
    """The layout of a context's states; values are transposed without flash attention."""

    config: GriffinConfig
    cache_type: str
    transposed: bool
    streams: int

    def layers(self, kind: str) -> list[str]:
        return [f"layers.{i}" for i, k in enumerate(self.config.block_types) if k == kind]

    def is_transposed(self, name: str) -> bool:
        return name.endswith(".conv1d") or (self.transposed and name.endswith(".value"))


def unpack(data: bytes, layout: StateLayout) -> State:
    """Returns the canonical state, without a batch axis, of a sequence that has seen a token."""
    record, window = _checked_record(data, layout), layout.config.window
    positions = record["cells"]["position"][0]
    order = np.argsort(positions)[-window:]
    if (np.diff(positions[order]) != 1).any():
        raise _drifted("the cells' positions do not follow one another")
    state: State = {POSITION: np.array(positions[order[-1]] + 1, np.int64)}
    for name in _tensors(record):
        array = record[name]["data"][0]
        array = array.T if layout.is_transposed(name) else array
        if name.endswith((".key", ".value")):
            array = np.pad(array[order], ((window - len(order), 0), (0, 0)))
        state[name] = array
    return state


def pack(state: State, layout: StateLayout) -> bytes:
    """Inverts `unpack`; cells are in the order of positions, from the first token on."""
    position = int(state[POSITION])
    cells = min(position, layout.config.window)
    record = _blank(layout, cells, stream=0)
    record["cells"]["position"] = np.arange(position - cells, position)
    record["last"]["position"] = position - 1
    for name in _tensors(record):
        array = state[name]
        if name.endswith((".key", ".value")):
            array = array[len(array) - cells :]
        record[name]["data"] = array.T if layout.is_transposed(name) else array
    return record.tobytes()


def _checked_record(data: bytes, layout: StateLayout) -> np.ndarray:
    size = 4 * layout.streams
    counts = np.frombuffer(data[_CELLS_AT:][:size].ljust(size, b"\0"), "<u4")
    stream = int((counts > 0).argmax())
    cells = int(counts[stream])
    if not 0 < cells < len(data):
        raise _drifted(f"it has {cells} cells in {len(data)} bytes")
    expected = _blank(layout, cells, stream)
    if len(data) != expected.nbytes:
        raise _drifted(f"it has {len(data)} bytes; expected {expected.nbytes}")
    record = np.frombuffer(data, expected.dtype)
    for (name, number), (_, known) in zip(_fixed(record), _fixed(expected), strict=True):
        if (number != known).any():
            raise _drifted(f"{name} is {number.flat[0]}; expected {known.flat[0]}")
    return record


def _blank(layout: StateLayout, cells: int, stream: int) -> np.ndarray:
    record = np.zeros(1, _fields(layout, cells, stream))
    record["magic"], record["streams"] = MAGIC, layout.streams
    record["number of cells"], record["cells"]["sequences"] = cells, 1
    record["transposed"] = layout.transposed
    record["attention layers"] = len(layout.layers("attention"))
    record["recurrent cells"], record["layers"] = 1, layout.config.num_layers
    for name in _tensors(record):
        for number, value in _HEADERS.items():
            if number in (record[name].dtype.names or ()):
                record[name][number] = value(record[name]["data"])
    return record


def _fields(layout: StateLayout, cells: int, stream: int) -> list[tuple[Any, ...]]:
    config, cache = layout.config, layout.cache_type
    rows = [("type", "<i4"), ("row_bytes", "<u8"), ("data", cache, (cells, config.head_dim))]
    columns = [("type", "<i4"), ("item_bytes", "<u4"), ("columns", "<u4")]
    values = [*columns, ("data", cache, (config.head_dim, cells))] if layout.transposed else rows
    head = [("type", "<i4"), ("bytes", "<u8")]
    conv = [*head, ("data", "<f4", (config.lru_width, config.conv_width - 1))]
    lru = [*head, ("data", "<f4", (config.lru_width,))]
    attention, recurrent = layout.layers("attention"), layout.layers("recurrent")
    return [
        *(("magic", "<u4"), ("sequence", "<i4"), ("streams", "<u4")),
        *(("streams before", "<u4", stream), ("number of cells", "<u4"), ("cells", _CELL, cells)),
        *(("transposed", "<u4"), ("attention layers", "<u4")),
        *((f"{layer}.key", rows) for layer in attention),
        *((f"{layer}.value", values) for layer in attention),
        *(("streams after", "<u4", layout.streams - stream - 1), ("recurrent cells", "<u4")),
        *(("last", [("position", "<i4"), ("sequences", "<u4")]), ("recurrent transposed", "<u4")),
        ("layers", "<u4"),
        *((f"{layer}.conv1d", conv) for layer in recurrent),
        *((f"{layer}.rg_lru", lru) for layer in recurrent),
    ]


def _tensors(record: np.ndarray) -> list[str]:
    return [name for name in record.dtype.names or () if name.startswith("layers.")]


def _fixed(record: np.ndarray, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name in record.dtype.names or ():
        if record[name].dtype.names:
            yield from _fixed(record[name], f"{name} ")
        elif name not in _NOT_FIXED:
            yield prefix + name, record[name]


def _drifted(what: str) -> RequestError:
    return RequestError(
        f"llama.cpp's state is not laid out as this rgexport knows it: {what}; "
        "install the llama.cpp that `rgexport llama-cpp build` makes"
    )
