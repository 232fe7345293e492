"""What is read of ggml's tensors, on tensors that ggml makes."""

import ctypes
from collections.abc import Iterator

import pytest

from rgexport.errors import RequestError
from rgexport.quantize.ggml_library import load_library
from rgexport.runtimes.llama_cpp.ggml_tensor import name_of, operation_of, read_floats
from tests.artifacts import require_ggml

_F32, _F16 = 0, 1


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Tensors:
    """Makes tensors in a context of ggml's."""

    def __init__(self) -> None:
        self._library = load_library()
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_set_name", "ggml_transpose"):
            getattr(self._library, name).restype = ctypes.c_void_p
        self._context = ctypes.c_void_p(self._library.ggml_init(_Parameters(1 << 16, None, False)))

    def new(self, kind: int, name: bytes) -> int:
        """One of [3, 2] elements."""
        size = ctypes.c_int64(2), ctypes.c_int64(3)
        tensor: int = self._library.ggml_new_tensor_2d(self._context, kind, *size)
        self._library.ggml_set_name(ctypes.c_void_p(tensor), name)
        return tensor

    def transposed(self, tensor: int) -> int:
        """The same elements in another order."""
        found: int = self._library.ggml_transpose(self._context, ctypes.c_void_p(tensor))
        return found

    def close(self) -> None:
        """Frees all of them."""
        self._library.ggml_free(self._context)


@pytest.fixture
def tensors() -> Iterator[Tensors]:
    require_ggml()
    made = Tensors()
    yield made
    made.close()


def test_names_and_operations(tensors: Tensors) -> None:
    tensor = tensors.new(_F32, b"attn_norm-3")
    assert (name_of(tensor), operation_of(tensor)) == ("attn_norm-3", "NONE")
    assert operation_of(tensors.transposed(tensor)) == "TRANSPOSE"


def test_other_types_and_gaps_are_refused(tensors: Tensors) -> None:
    with pytest.raises(RequestError, match="half has 6 elements in 12 bytes; expected float32"):
        read_floats(tensors.new(_F16, b"half"))
    with pytest.raises(RequestError, match="without gaps"):
        read_floats(tensors.transposed(tensors.new(_F32, b"whole")))
