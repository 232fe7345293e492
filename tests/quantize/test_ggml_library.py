"""ggml's quantizer, against gguf-py's dequantizer and llama-quantize."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.errors import RequestError
from rgexport.griffin.tensor import DTYPES
from rgexport.quantize import ggml_library
from rgexport.quantize.ggml_library import find_library, load_library, quantize_rows
from rgexport.quantize.ggml_types import TYPES, GgmlType

QUANTIZED = [kind for kind in TYPES.values() if kind.is_quantized]
FLOATS = [kind for kind in TYPES.values() if not kind.is_quantized]

weights_of_any_size = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([256, 512])),
    elements=st.integers(-100_000, 100_000).map(lambda number: np.float32(number / 1000)),
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The installed library; without one, the tests that take it are skipped."""
    try:
        return load_library()
    except RequestError as error:
        pytest.skip(str(error))


def normal(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32)


def dequantized(stored: np.ndarray, kind: GgmlType) -> np.ndarray:
    return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(kind.value))


def in_one_call(library: ctypes.CDLL, rows: np.ndarray, kind: GgmlType) -> np.ndarray:
    out = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    library.ggml_quantize_chunk(kind.value, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    return out


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_threads_and_dtypes_change_nothing(
    kind: GgmlType, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = normal(37, 768).astype(DTYPES["bfloat16"])
    expected = in_one_call(library, weights.astype(np.float32), kind)
    monkeypatch.setattr(ggml_library, "CHUNK_BYTES", 5 * 768 * 4)
    np.testing.assert_array_equal(quantize_rows(weights, kind.name), expected)
    strided = np.repeat(weights, 2, axis=0)[::2]
    np.testing.assert_array_equal(quantize_rows(strided, kind.name), expected)


@given(weights_of_any_size, st.sampled_from(["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]))
def test_plain_types_are_those_of_gguf_py(
    library: ctypes.CDLL, weights: np.ndarray, name: str
) -> None:
    theirs = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(TYPES[name].value))
    np.testing.assert_array_equal(quantize_rows(weights, name), theirs)


def test_floats_of_all_exponents_are_rounded_as_ggml_rounds_them(library: ctypes.CDLL) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        floats = (patterns | np.uint32(low)).view(np.float32)
        for kind, largest in ((TYPES["f16"], 65519.0), (TYPES["bf16"], 3.38e38)):
            rows = floats[np.abs(floats) <= largest][None]
            np.testing.assert_array_equal(
                quantize_rows(rows, kind.name), in_one_call(library, rows, kind)
            )


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_floats_take_no_library(kind: GgmlType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_library, "load_library", lambda: pytest.fail("loaded"))
    assert quantize_rows(normal(2, 5), kind.name).shape == (2, kind.row_bytes(5))


def test_importances_decide_where_the_error_goes(library: ctypes.CDLL) -> None:
    weights = normal(32, 512)
    importance = np.where(np.arange(512) % 8, 0.01, 100).astype(np.float32)
    for kind in QUANTIZED:
        plain, weighted = (
            dequantized(quantize_rows(weights, kind.name, given), kind) - weights
            for given in (None, importance)
        )
        if kind.bits_per_weight < 8:
            assert (weighted**2 @ importance).sum() < (plain**2 @ importance).sum(), kind.name
        else:
            np.testing.assert_array_equal(weighted, plain)


@pytest.mark.parametrize("name", ["f16", "q4_0", "q6_k"])
def test_a_weight_beyond_the_type_is_named(name: str, library: ctypes.CDLL) -> None:
    weights = normal(4, 256)
    weights[2, 7] = -3e8
    with pytest.raises(RequestError, match=f"weight of 3e\\+08 is more than {name} holds"):
        quantize_rows(weights, name)


def test_without_the_package_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ggml_library.LIBRARY_PATH, raising=False)
    monkeypatch.setattr(ggml_library, "find_spec", lambda name: None)
    with pytest.raises(
        RequestError, match=r"llama-cpp-python, which is missing.*rgexport llama-cpp build"
    ):
        quantize_rows(normal(1, 32), "q4_0")


def test_another_build_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ggml_library.LIBRARY_PATH, str(tmp_path))
    with pytest.raises(RequestError, match=f"has no {tmp_path}"):
        load_library()
    (tmp_path / ggml_library.FILE_NAME).write_bytes(b"not a library")
    assert find_library().parent == tmp_path
    with pytest.raises(RequestError, match=f"{tmp_path}.* cannot be used"):
        load_library()


def test_a_library_of_other_types_is_refused(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TYPES, "q4_k", GgmlType("q4_k", 12, 256, 148))
    ggml_library._load.cache_clear()
    with pytest.raises(RequestError, match=r"type 12 is q4_k with 256 weights in 144 bytes.*148"):
        load_library()
