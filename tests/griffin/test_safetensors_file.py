"""The safetensors reader against the reference implementation, and against damaged files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from rgexport.errors import RequestError
from rgexport.griffin.safetensors_file import read_header, read_metadata
from rgexport.griffin.safetensors_writer import write_weights
from rgexport.griffin.tensor import DTYPES, from_array

Header = dict[str, object]


def file_with(path: Path, header: Header | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(
        st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
    ),
    dtype=st.sampled_from(["float32", "float16"]),
    limit=st.integers(1, 64),
)
def test_reads_what_the_reference_implementation_writes(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    dtype: str,
    limit: int,
) -> None:
    path = tmp_path_factory.mktemp("reference") / "model.safetensors"
    generator = np.random.default_rng(0)
    arrays = {f"t{i}": generator.random(s).astype(dtype) for i, s in enumerate(shapes)}
    path.write_bytes(save(arrays))
    header = read_header(path)
    assert header.keys() == arrays.keys()
    for name, array in arrays.items():
        rows = header[name].rows()
        assert rows.dtype == array.dtype
        np.testing.assert_array_equal(rows.whole(), array)
        slabs = [slab for _, slab in rows.slabs(limit)]
        np.testing.assert_array_equal(np.concatenate(slabs), array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_weights_come_back(tmp_path: Path, dtype: str) -> None:
    array = np.arange(24, dtype=np.float32).reshape(6, 4).astype(DTYPES[dtype])
    write_weights(tmp_path, {"a": from_array(array), "b": from_array(array[0])})
    header = read_header(tmp_path / "model.safetensors")
    assert list(header) == ["model.a", "model.b"]
    assert header["model.a"].offset % 8 == 0
    np.testing.assert_array_equal(header["model.a"].rows().read(2, 5), array[2:5])
    np.testing.assert_array_equal(header["model.b"].rows().whole(), array[0])


def test_reads_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(save({"x": np.zeros(2, np.float32)}, {"by": "me", "words": "ä \n"}))
    assert read_metadata(path) == {"by": "me", "words": "ä \n"}
    assert list(read_header(path)) == ["x"]
    path.write_bytes(save({"x": np.zeros(2, np.float32)}))
    assert read_metadata(path) == {}
    file_with(path, {"__metadata__": None, "a": tensor()}, bytes(8))
    assert read_metadata(path) == {} and list(read_header(path)) == ["a"]


@pytest.mark.parametrize("value", [3, "words", {"a": 1}])
@pytest.mark.parametrize("read", [read_metadata, read_header])
def test_metadata_that_is_no_object_of_texts(
    tmp_path: Path, value: object, read: Callable[[Path], object]
) -> None:
    """As in the reference implementation, the whole file is refused."""
    path = file_with(tmp_path / "a", {"__metadata__": value, "a": tensor()}, bytes(8))
    with pytest.raises(RequestError, match="__metadata__ is no object of texts"):
        read(path)


BROKEN: dict[str, tuple[Header | bytes, bytes, str]] = {
    "not JSON": (b"{'a': 1}", b"", "header is not JSON"),
    "deep JSON": (b'{"a":' + b"[" * 100_000, b"", "header is not JSON"),
    "twice": (b'{"a": {}, "a": {}}', b"", "names a field twice"),
    "no object": ({"a": 3}, b"", "unknown dtype None"),
    "dtype": ({"a": tensor("F31")}, bytes(8), "tensor a has the unknown dtype 'F31'"),
    "shape": ({"a": tensor(shape=[-2])}, bytes(8), "no valid shape"),
    "boolean shape": ({"a": tensor(shape=[True, 2])}, bytes(8), "no valid shape"),
    "offsets": ({"a": tensor(offsets=[0])}, bytes(8), "no valid shape"),
    "length": ({"a": tensor(offsets=(0, 4))}, bytes(4), "spans 4 bytes; expected 8"),
    "reversed": ({"a": tensor(offsets=(8, 0))}, bytes(8), "spans -8 bytes; expected 8"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12), "b overlaps"),
    "gap": ({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20), "b leaves a gap"),
    "truncated": ({"a": tensor()}, bytes(7), "is truncated"),
    "too long": ({"a": tensor()}, bytes(9), "is damaged: it has"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_says_what_is_wrong_with_a_broken_file(tmp_path: Path, case: str) -> None:
    header, data, message = BROKEN[case]
    path = file_with(tmp_path / "model.safetensors", header, data)
    with pytest.raises(RequestError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"Call me Ishmael. Some years ago", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "expected at most"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "is truncated"),
    ],
)
def test_recognizes_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": from_array(np.zeros((8, 8), np.float32))})
    path = tmp_path / "model.safetensors"
    rows = read_header(path)["model.a"].rows()
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(RequestError, match="was changed while it was read"):
        rows.whole()
