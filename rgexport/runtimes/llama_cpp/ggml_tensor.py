"""ggml's tensors while llama.cpp computes: by the functions that it exports, not by its struct.

They are declared in ggml.h and ggml-backend.h; a pointer to a tensor is an integer here.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.quantize.ggml_library import load_library

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "ggml_get_name": (ctypes.c_char_p, (_POINTER,)),
    "ggml_op_desc": (ctypes.c_char_p, (_POINTER,)),
    "ggml_nelements": (ctypes.c_int64, (_POINTER,)),
    "ggml_nbytes": (_SIZE, (_POINTER,)),
    "ggml_is_contiguous": (ctypes.c_bool, (_POINTER,)),
    "ggml_backend_tensor_get": (None, (_POINTER, _POINTER, _SIZE, _SIZE)),
}
"""Name → result and arguments."""


def name_of(tensor: int) -> str:
    """What the graph calls it, such as `attn_norm-3`."""
    return str(_functions()["ggml_get_name"](tensor).decode())


def operation_of(tensor: int) -> str:
    """What makes it, such as `MUL_MAT`."""
    return str(_functions()["ggml_op_desc"](tensor).decode())


def read_floats(tensor: int) -> np.ndarray:
    """A copy of all its elements, float32 [n], wherever they are; the innermost axis is last.

    Raises:
        RequestError: it has gaps, or is of another type.
    """
    functions = _functions()
    count, size = functions["ggml_nelements"](tensor), functions["ggml_nbytes"](tensor)
    if not functions["ggml_is_contiguous"](tensor) or size != 4 * count:
        raise RequestError(
            f"llama.cpp's {name_of(tensor)} has {count} elements in {size} bytes; expected "
            "float32 without gaps: install the llama.cpp that `rgexport llama-cpp build` makes"
        )
    values = np.empty(count, np.float32)
    functions["ggml_backend_tensor_get"](tensor, values.ctypes.data, 0, size)
    return values


@cache
def _functions() -> dict[str, Any]:
    """The functions in the library that llama-cpp-python has loaded."""
    library = load_library()
    found = {name: getattr(library, name) for name in _FUNCTIONS}
    for name, (result, arguments) in _FUNCTIONS.items():
        found[name].restype, found[name].argtypes = result, arguments
    return found
