"""Quantizes rows to ggml's tensor types, with the ggml library of llama-cpp-python.

`ggml_quantize_chunk` is public (ggml.h), but any version can be installed: its types are checked
when it is loaded.
"""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.tensor import slab_bounds
from rgexport.parallelism import usable_processors
from rgexport.quantize.ggml_types import TYPES, GgmlType

CHUNK_BYTES = 4 << 20
"""Rows, in float32, that a thread quantizes in one call."""

LIBRARY_PATH = "LLAMA_CPP_LIB_PATH"
"""llama-cpp-python's own environment variable for the folder of another build."""

FILE_NAME = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}.get(
    sys.platform, "libggml-base.so"
)
_REMEDY = (
    "install it with `rgexport llama-cpp build`, or pip install 'rgexport[gguf]', or take "
    "--type f16, which needs none"
)

_FLOATS: dict[str, type] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
"""These need no library: numpy rounds to nearest even, as ggml does."""


def quantize_rows(rows: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Stores rows as llama-quantize does, byte for byte, on all cores.

    It can be called from any thread, and releases the GIL.

    Args:
        rows: [n, columns], finite, of any float dtype.
        kind: a name of `ggml_types.TYPES` whose blocks fit the columns.
        importance: float32 [columns], the weight of each column's error; types of 8 bits and
            more ignore it.

    Returns:
        uint8 [n, row_bytes].

    Raises:
        RequestError: the library is missing or has other types, or the type cannot hold a value.
    """
    if kind in _FLOATS:
        return _converted(rows, kind)
    count, columns = rows.shape
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importances {importance.shape} for rows of {columns} weights")
    importance = None if importance is None else np.ascontiguousarray(importance, np.float32)
    out = np.empty((count, TYPES[kind].row_bytes(columns)), np.uint8)
    library = load_library()

    def quantize(bounds: tuple[int, int]) -> bool:
        part = slice(*bounds)
        weights = np.ascontiguousarray(rows[part], np.float32)
        return _quantize_chunk(library, TYPES[kind], weights, importance, out[part])

    with ThreadPoolExecutor(usable_processors()) as pool:
        sound = [*pool.map(quantize, slab_bounds(count, 4 * columns, CHUNK_BYTES))]
    if not all(sound):
        raise _out_of_range(rows, kind)
    return out


def _quantize_chunk(
    library: ctypes.CDLL,
    kind: GgmlType,
    weights: np.ndarray,
    importance: np.ndarray | None,
    out: np.ndarray,
) -> bool:
    """Fills `out`; returns whether all its scales are finite. ctypes releases the GIL."""
    where = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(
        kind.value, weights.ctypes.data, out.ctypes.data, 0, *weights.shape, where
    )
    return library.ggml_validate_row_data(kind.value, out.ctypes.data, out.nbytes)


def _converted(rows: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored: np.ndarray = np.ascontiguousarray(rows, np.float32).astype(
            _FLOATS[kind], copy=False
        )
    if not np.isfinite(stored).all():
        raise _out_of_range(rows, kind)
    return stored.view(np.uint8)


def _out_of_range(rows: np.ndarray, kind: str) -> RequestError:
    largest = float(np.abs(rows).max())
    return RequestError(f"a weight of {largest:.4g} is more than {kind} holds; take another type")


def load_library() -> ctypes.CDLL:
    """The checked library, which any thread may call.

    Raises:
        RequestError: it is not installed, cannot be loaded, or has other types than `TYPES`.
    """
    return _load(find_library())


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise RequestError(f"{path} cannot be used: {error}; {_REMEDY}") from None
    _require_known_types(library, path)
    for kind in TYPES.values():
        library.ggml_quantize_init(kind.value)
    return library


def find_library() -> Path:
    """The path of the ggml library of llama-cpp-python, which is not imported.

    Raises:
        RequestError: it is not installed, or has no such library.
    """
    folder = os.environ.get(LIBRARY_PATH)
    if folder is None:
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise RequestError(
                f"quantizing for llama.cpp takes llama-cpp-python, which is missing; {_REMEDY}"
            )
        folder = str(Path(spec.origin).parent / "lib")
    path = Path(folder, FILE_NAME)
    if not path.is_file():
        raise RequestError(f"llama-cpp-python has no {path}; {_REMEDY}")
    return path


_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_type_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "ggml_blck_size": (ctypes.c_int64, (ctypes.c_int,)),
    "ggml_type_size": (ctypes.c_size_t, (ctypes.c_int,)),
    "ggml_row_size": (ctypes.c_size_t, (ctypes.c_int, ctypes.c_int64)),
    "ggml_quantize_init": (None, (ctypes.c_int,)),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p),
    ),
    "ggml_validate_row_data": (
        ctypes.c_bool,
        (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t),
    ),
}
"""Name → result and arguments, as ggml.h declares them."""


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def _require_known_types(library: ctypes.CDLL, path: Path) -> None:
    """Refuses a library whose types differ from `TYPES`, naming the first that does."""
    for kind in TYPES.values():
        found = (
            (library.ggml_type_name(kind.value) or b"nothing").decode().lower(),
            library.ggml_blck_size(kind.value),
            library.ggml_type_size(kind.value),
            library.ggml_row_size(kind.value, 2 * kind.block),
        )
        if found != (kind.name, kind.block, kind.block_bytes, kind.row_bytes(2 * kind.block)):
            raise RequestError(
                f"{path} does not fit this rgexport: its type {kind.value} is {found[0]} with "
                f"{found[1]} weights in {found[2]} bytes, expected {kind.name} with {kind.block} "
                f"in {kind.block_bytes}; {_REMEDY}"
            )
