"""Importance matrices in both formats of llama-imatrix."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgexport.errors import RequestError
from rgexport.quantize.imatrix import MAX_BYTES, Imatrix, read_imatrix
from tests.quantize.ggml_files import legacy_imatrix, write_imatrix, write_tensors

NAME, OTHER = "blk.0.ffn_down.weight", "token_embd.weight"
KEYS = {
    "imatrix.datasets": ["calibration.txt", "more.txt"],
    "imatrix.chunk_count": 12,
    "imatrix.chunk_size": 512,
}
squares = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1000, width=32))
each_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write_gguf(path: Path, tensors: dict[str, np.ndarray], keys: dict[str, object]) -> Path:
    writer = gguf.GGUFWriter(path, "none")
    for key, value in keys.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(key, value)
    write_tensors(writer, tensors)
    return path


@each_example
@given(values=squares, count=st.integers(1, 1000))
def test_sums_are_divided_by_counts(tmp_path: Path, values: np.ndarray, count: int) -> None:
    sums = values[None]
    counts = np.full((1, 1), count, np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", {f"{NAME}.in_sum2": sums, f"{NAME}.counts": counts}, KEYS
    )
    found = read_imatrix(path)
    np.testing.assert_array_equal(found.entries[NAME], values / np.float32(count))
    assert found.entries[NAME].dtype == np.float32
    assert (found.dataset, found.chunks) == ("calibration.txt", 12)


def test_a_count_of_zero_gives_one(tmp_path: Path) -> None:
    sums = np.array([[2, 4], [6, 8]], np.float32)
    tensors = {f"{NAME}.in_sum2": sums, f"{NAME}.counts": np.array([[2], [0]], np.float32)}
    found = read_imatrix(write_gguf(tmp_path / "m.gguf", tensors, KEYS))
    np.testing.assert_array_equal(found.entries[NAME], [1, 2, 1, 1])


@each_example
@given(values=squares, calls=st.integers(-1, 100))
def test_the_older_format_divides_by_calls(tmp_path: Path, values: np.ndarray, calls: int) -> None:
    path = tmp_path / "imatrix.dat"
    end = struct.pack("<ii", 7, 8) + b"text.txt"
    path.write_bytes(legacy_imatrix({NAME: (calls, values), OTHER: (2, values)}, end))
    found = read_imatrix(path)
    np.testing.assert_array_equal(found.entries[NAME], values / np.float32(max(calls, 1)))
    np.testing.assert_array_equal(found.entries[OTHER], values / np.float32(2))
    assert (found.dataset, found.chunks) == ("text.txt", 7)


def test_metadata_is_in_the_order_of_llama_quantize(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(path, {NAME: np.ones(4, np.float32), OTHER: np.ones(4, np.float32)})
    assert list(read_imatrix(path).metadata().items()) == [
        ("quantize.imatrix.file", str(path)),
        ("quantize.imatrix.dataset", "text.txt"),
        ("quantize.imatrix.entries_count", 2),
        ("quantize.imatrix.chunks_count", 3),
    ]
    path.write_bytes(legacy_imatrix({NAME: (1, np.ones(3, np.float32))}))  # it may end early
    assert list(read_imatrix(path).metadata().values()) == [str(path), 1]


def test_long_names_are_cut_as_llama_quantize_cuts_them() -> None:
    told = Imatrix(Path("ä" * 200), {}, "x" * 200, 0).metadata()
    assert told["quantize.imatrix.file"] == "ä" * 63
    assert told["quantize.imatrix.dataset"] == "x" * 127


def test_importances_must_fit_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(path, {NAME: np.ones(4, np.float32), OTHER: np.ones(4, np.float32)})
    matrix = read_imatrix(path)
    np.testing.assert_array_equal(matrix.importance(NAME, 4), np.ones(4))
    assert matrix.importance("blk.1.ffn_down.weight", 4) is None
    for name in (NAME, OTHER):
        with pytest.raises(RequestError, match=f"4 importances for {name}, which has 5 columns"):
            matrix.importance(name, 5)


def test_a_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_imatrix(path, {NAME: np.ones(4, np.float32)})
    read_imatrix(path).require_any_of([NAME, OTHER])
    with pytest.raises(RequestError, match=f"no tensor of this model.*{NAME}"):
        read_imatrix(path).require_any_of([OTHER])


ONES, COUNT = np.ones((1, 4), np.float32), np.ones((1, 1), np.float32)


def sums(values: np.ndarray, count: np.ndarray = COUNT) -> dict[str, np.ndarray]:
    return {f"{NAME}.in_sum2": values, f"{NAME}.counts": count}


BAD_GGUF: dict[str, tuple[dict[str, np.ndarray], dict[str, object], str]] = {
    "a model": ({NAME: ONES}, {}, "no imatrix.chunk_count"),
    "no sums": ({NAME: ONES}, KEYS, "no tensor NAME.in_sum2"),
    "no counts": ({f"{NAME}.in_sum2": ONES}, KEYS, "counts is missing"),
    "half sums": (sums(ONES.astype(np.float16)), KEYS, "in_sum2 is f16; expected f32"),
    "three counts": (sums(ONES, np.ones((1, 3), np.float32)), KEYS, "3 counts for 4 sums"),
    "endless count": (sums(ONES, COUNT * np.inf), KEYS, "1 counts for 4 sums"),
    "no number": (sums(ONES * np.nan), KEYS, "no squares"),
    "negative": (sums(-ONES), KEYS, "no squares"),
    "wrong keys": (sums(ONES), KEYS | {"imatrix.chunk_count": ["12"]}, "wrong type"),
}
GOOD = legacy_imatrix(
    {NAME: (2, np.ones(5)), OTHER: (2, np.ones(3))}, struct.pack("<ii", 7, 1) + b"t"
)
BAD_LEGACY: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "none of the older format"),
    "text": (b"hello, this is a text and no matrix", "none of the older format"),
    "no entries": (struct.pack("<i", 0) + bytes(50), "none of the older format"),
    "a negative length": (struct.pack("<ii", 1, -5) + bytes(50), "length of -5"),
    "an endless name": (struct.pack("<ii", 1, 2**31 - 1) + bytes(50), "truncated or damaged"),
    "an endless entry": (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1) + bytes(50),
        "truncated or damaged",
    ),
    "no values": (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0) + bytes(50),
        "entry 0 has no new name, or no values",
    ),
    "no name": (struct.pack("<iiii", 1, 0, 1, 1) + bytes(4), "entry 0 has no new name"),
    "a name twice": (
        struct.pack("<i", 2) + 2 * legacy_imatrix({"a": (1, np.ones(1))})[4:],
        "entry 1 has no new name",
    ),
    "an infinity": (legacy_imatrix({NAME: (1, np.full(3, np.inf))}), "no squares"),
}


@pytest.mark.parametrize("case", [*BAD_GGUF, *BAD_LEGACY])
def test_wrong_files(case: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix"
    if case in BAD_GGUF:
        tensors, keys, complaint = BAD_GGUF[case]
        write_gguf(path, tensors, keys)
    else:
        content, complaint = BAD_LEGACY[case]
        path.write_bytes(content)
    with pytest.raises(RequestError, match=complaint) as error:
        read_imatrix(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_file_of_the_older_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    without_end = len(GOOD) - 9
    for size in {*range(len(GOOD))} - {without_end, without_end + 4}:
        path.write_bytes(GOOD[:size])
        with pytest.raises(RequestError):
            read_imatrix(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    with pytest.raises(RequestError, match=f"not an importance matrix.*{MAX_BYTES + 1} bytes"):
        read_imatrix(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_imatrix(tmp_path / "missing")
