"""Quantizes rows to ggml's tensor types, with the ggml library of llama-cpp-python."""

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
from rgexport.quantize.schemes.ggml_types import TYPES, GgmlType

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
    """Stores rows [n, columns] as llama-quantize does, byte for byte, uint8 [n, row_bytes].

    It runs on all cores, can be called from any thread, and releases the GIL. `kind` is a key of
    `TYPES`. `importance`, float32 [columns], weighs errors; types of 8 bits and more ignore it.
    Raises RequestError if the library is missing or has other types, a weight is too large for the
    type, or it needs importances.
    """
    if kind in _FLOATS:
        with np.errstate(over="ignore"):
            floats: np.ndarray = np.asarray(np.ascontiguousarray(rows, np.float32), _FLOATS[kind])
        if not np.isfinite(floats).all():
            raise _out_of_range(rows, kind)
        return floats.view(np.uint8)
    count, columns = rows.shape
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importances {importance.shape} for rows of {columns} weights")
    if importance is None and TYPES[kind].needs_importances:  # else ggml ends the process
        raise RequestError(f"{kind} needs importances; add --calibration or --imatrix")
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    importance_pointer = None if importance is None else importance.ctypes.data
    type_number = TYPES[kind].value
    out = np.empty((count, TYPES[kind].row_bytes(columns)), np.uint8)
    library = load_library()

    def quantize(bounds: tuple[int, int]) -> bool:
        weights = np.ascontiguousarray(rows[slice(*bounds)], np.float32)
        chunk = out[slice(*bounds)]
        pointers = weights.ctypes.data, chunk.ctypes.data
        library.ggml_quantize_chunk(type_number, *pointers, 0, *weights.shape, importance_pointer)
        return bool(library.ggml_validate_row_data(type_number, pointers[1], chunk.nbytes))

    with ThreadPoolExecutor(usable_processors()) as pool:
        are_valid = [*pool.map(quantize, slab_bounds(count, 4 * columns, CHUNK_BYTES))]
    if not all(are_valid):
        raise _out_of_range(rows, kind)
    return out


def _out_of_range(rows: np.ndarray, kind: str) -> RequestError:
    largest = float(np.abs(rows).max())
    return RequestError(f"a weight of {largest:.4g} is more than {kind} holds; take another type")


def load_library() -> ctypes.CDLL:
    """Loads and checks the library, which any thread may call; RequestError if it does not fit."""
    return _load(find_library())


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise RequestError(f"{path} cannot be used: {error}; {_REMEDY}") from None
    for kind in TYPES.values():
        _require_known(library, path, kind)
        if not kind.has_codebook:  # whose tables take seconds: made when they are needed
            library.ggml_quantize_init(kind.value)
    return library


def find_library() -> Path:
    """Returns the path of the ggml library of llama-cpp-python, which is not imported."""
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
    "ggml_validate_row_data": (ctypes.c_bool, (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)),
    "ggml_get_name": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_op_desc": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_nelements": (ctypes.c_int64, (ctypes.c_void_p,)),
    "ggml_nbytes": (ctypes.c_size_t, (ctypes.c_void_p,)),
    "ggml_is_contiguous": (ctypes.c_bool, (ctypes.c_void_p,)),
    "ggml_backend_tensor_get": (None, (*[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2)),
}
"""Name → result and arguments, as ggml.h declares them, and ggml-backend.h the last."""


def _require_known(library: ctypes.CDLL, path: Path, kind: GgmlType) -> None:
    loaded = (
        (library.ggml_type_name(kind.value) or b"nothing").decode().lower(),
        library.ggml_blck_size(kind.value),
        library.ggml_type_size(kind.value),
        library.ggml_row_size(kind.value, 2 * kind.block),
    )
    if loaded != (kind.name, kind.block, kind.block_bytes, kind.row_bytes(2 * kind.block)):
        raise RequestError(
            f"{path} does not fit this rgexport: its type {kind.value} is {loaded[0]} with "
            f"{loaded[1]} weights in {loaded[2]} bytes, expected {kind.name} with {kind.block} in "
            f"{kind.block_bytes}; {_REMEDY}"
        )
