"""Compressed weights, written by Apple's library, against coremltools' own decompression."""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

pytest.importorskip("coremltools")

from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
    constexpr_blockwise_shift_scale,
    constexpr_lut_to_dense,
)

from rgexport.export.mil.program import BITS, FileValue, Name, Operation, TensorType
from rgexport.runtimes.coreml.interpreter import weights
from rgexport.runtimes.coreml.interpreter.weights import (
    Unsupported,
    Weight,
    WeightCache,
    compressed_weight,
    file_weight,
    rounded_to_half,
    whole_constant,
)
from tests.runtimes.coreml.interpreter.mil_programs import (
    FILE,
    Blobs,
    immediate,
    main,
    opened,
    operation,
    package,
    random_elements,
)

random = np.random.default_rng(0)


@pytest.fixture
def slab_of_64_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SLAB_BYTES", 64)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 24)


def compressed(
    folder: Path, kind: str, type: TensorType, parts: dict[str, tuple[np.ndarray, str]]
) -> Weight:
    """A weight whose parts lie in a file."""
    blobs = Blobs(folder)
    values = {name: blobs.add(array, dtype) for name, (array, dtype) in parts.items()}
    given = package(main([], {}, []), weights=blobs.close())
    return compressed_weight(given, operation(kind, values, {"w": type}), WeightCache())


def check(weight: Weight, expected: np.ndarray) -> None:
    """All ways to read a weight give the same."""
    np.testing.assert_array_equal(weight.whole(), expected)
    assert weight.whole().dtype == expected.dtype
    for start, stop, rows in weight.slabs():
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, expected[start:stop])
    indices = np.random.default_rng(0).integers(0, len(expected), (2, 3))
    np.testing.assert_array_equal(weight.rows(indices), expected[indices])


@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 1), (9, 4, 5), (5, 2, 3)])
@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("result", ["float16", "float32"])
@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.usefixtures("slab_of_64_bytes")
def test_shift_and_scale(
    dtype: str, result: str, has_offset: bool, rows: int, groups: int, size: int, tmp_path: Path
) -> None:
    shape = rows, groups * size
    elements = random_elements(random, dtype, shape)
    scale = random_elements(random, result, (rows, groups))
    parts = {"data": (elements, dtype), "scale": (scale, result)}
    offset = None
    if has_offset:
        shifts = random_elements(random, dtype, (rows, groups))
        parts["offset"] = shifts, dtype
        offset = shifts.astype(np.float32)
    type = TensorType(result, shape)
    weight = compressed(tmp_path, "constexpr_blockwise_shift_scale", type, parts)
    exact = constexpr_blockwise_shift_scale.decompress(elements, scale.astype(np.float32), offset)
    check(weight, exact.astype(result))


@pytest.mark.parametrize(("groups", "shape"), [(1, (1, 1)), (3, (15, 9)), (2, (4, 7))])
@pytest.mark.parametrize("result", ["float16", "float32"])
@pytest.mark.parametrize("dtype", ["uint1", "uint2", "uint3", "uint4", "uint6", "uint8"])
@pytest.mark.usefixtures("slab_of_64_bytes")
def test_palette(
    dtype: str, result: str, groups: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    indices = random_elements(random, dtype, shape)
    lut = random_elements(random, result, (groups, 1, 1 << BITS[dtype], 1))
    parts = {"indices": (indices, dtype), "lut": (lut, result)}
    weight = compressed(tmp_path, "constexpr_lut_to_dense", TensorType(result, shape), parts)
    check(weight, constexpr_lut_to_dense.decompress(indices, lut, None).astype(result))


@pytest.mark.parametrize("shape", [(1,), (9,), (7, 3), (2, 9, 5)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.usefixtures("slab_of_64_bytes")
def test_floats(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = random_elements(random, dtype, shape)
    blobs = Blobs(tmp_path)
    value = blobs.add(array)
    given = package(main([], {}, []), weights=blobs.close())
    check(file_weight(given, value, WeightCache()), array)
    np.testing.assert_array_equal(whole_constant(given, value), array)


@pytest.mark.parametrize(
    "dtype",
    [
        *("uint1", "uint2", "uint3", "uint4", "uint6", "uint8", "int4", "int8"),
        *("int16", "uint16", "int32", "uint32", "float16", "float32"),
    ],
)
def test_every_dtype_of_a_weight_file(dtype: str, tmp_path: Path) -> None:
    array = random_elements(np.random.default_rng(2), dtype, (5, 7))
    blobs = Blobs(tmp_path)
    blobs.add(np.ones(3, np.float32))
    value = blobs.add(array, dtype)
    given = package(main([], {}, []), weights=blobs.close())
    np.testing.assert_array_equal(whole_constant(given, value), array)
    blob = given.blob(value)
    assert (blob.offset, len(blob.read(0, value.type.nbytes))) == (
        value.offset + 64,
        value.type.nbytes,
    )


def test_a_float16_weight_is_rounded_after_the_product(tmp_path: Path) -> None:
    """Also where the offset is subtracted, which float16 could not always do exactly."""
    data = np.array([[200, 3]], np.uint8)
    scale = np.array([[0.1]], np.float16)
    parts = {
        "data": (data, "uint8"),
        "scale": (scale, "float16"),
        "offset": (np.array([[7]], np.uint8), "uint8"),
    }
    type = TensorType("float16", (1, 2))
    weight = compressed(tmp_path, "constexpr_blockwise_shift_scale", type, parts)
    exact = (data.astype(np.float64) - 7) * scale.astype(np.float64)
    np.testing.assert_array_equal(weight.whole(), exact.astype(np.float16))


def test_rounding_by_bits_equals_two_casts() -> None:
    """Every float16 value, the middle between it and the next, and the neighbors of that."""
    halves = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    step = np.diff(np.append(halves, np.float32(65504))) / 2
    middle = halves + step
    others = np.float32([np.nan, np.inf, 65504, 65519, 65520, 65536, 3e38, 1e-45, 2**-26, 2**-25])
    near = np.nextafter(middle, 0), np.nextafter(middle, np.float32(1e9))
    for values in (halves, middle, *near, others, np.geomspace(1e-9, 1e5, 9999, dtype="f4")):
        for signed in (values, -values):
            with np.errstate(all="ignore"):
                expected = signed.astype(np.float16).astype(np.float32)
                np.testing.assert_array_equal(rounded_to_half(signed), expected)


def sparse_file(path: Path, dtype: str, shape: tuple[int, ...]) -> FileValue:
    """A weight file of zeros that takes no disk."""
    type = TensorType(dtype, shape)
    code = {"int8": 4, "float16": 1}[dtype]
    with path.open("wb") as file:
        file.write(np.array([1, 2], "<u4").tobytes().ljust(64, b"\0"))
        header = np.array([0xDEADBEEF, code], "<u4").tobytes()
        header += np.array([type.nbytes, 128, 0], "<u8").tobytes()
        file.write(header.ljust(64, b"\0"))
        file.truncate(128 + type.nbytes)
    return FileValue(type, FILE, 64)


def linear_of(path: Path, value: FileValue) -> Any:
    rows, columns = value.type.shape
    scale = np.ones((rows, 1), np.float16)
    operations = [
        Operation(
            "constexpr_blockwise_shift_scale",
            "w",
            {"data": (value,), "scale": (immediate(scale),)},
            (("w", TensorType("float16", value.type.shape)),),
        ),
        operation(
            "linear",
            {"x": Name("x"), "weight": Name("w")},
            {"y": TensorType("float16", (1, rows))},
        ),
    ]
    inputs = {"x": TensorType("float16", (1, columns))}
    return opened(main(operations, inputs, ["y"]), weights=path, cache=32 << 20)


def test_a_large_weight_does_not_stay_in_memory(tmp_path: Path) -> None:
    """128 MB of int8 are 512 MB in float32; 32 of them may be kept, and 16 are at hand."""
    path = tmp_path / "weight.bin"
    run = linear_of(path, sparse_file(path, "int8", (32768, 4096)))
    memory = psutil.Process().memory_info
    before = memory().rss
    result = run({"x": np.ones((1, 4096), np.float16)}, {})
    assert not result["y"].any()
    assert memory().rss - before < 100 << 20


def test_a_row_is_read_alone(tmp_path: Path) -> None:
    value = sparse_file(tmp_path / "weight.bin", "float16", (1 << 20, 64))
    given = package(main([], {}, []), weights=tmp_path / "weight.bin")
    weight = file_weight(given, value, WeightCache())
    read: list[tuple[int, int]] = []

    def spy(start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return weight.read(start, stop)

    spied = Weight(weight.type, weight.key, spy, weight.cache)
    assert spied.rows(np.array([[7, 1 << 19]])).shape == (1, 2, 64)
    assert read == [(7, 8), (1 << 19, (1 << 19) + 1)]


def test_what_is_read_first_is_kept_up_to_the_limit() -> None:
    cache, made = WeightCache(1000), list[int]()

    def make(key: int) -> np.ndarray:
        made.append(key)
        return np.zeros(100, np.float32)

    for key in (1, 2, 3, 1, 2, 3):
        cache.get(key, lambda key=key: make(key))
    assert made == [1, 2, 3, 3]


def test_both_functions_share_what_is_kept(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    value = blobs.add(np.ones((4, 4), np.float32))
    given = package(main([], {}, []), weights=blobs.close())
    cache = WeightCache()
    one, other = (next(iter(file_weight(given, value, cache).slabs()))[2] for _ in range(2))
    assert one is other


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"scale": (4, 1), "zero": (4, 1)}, "input zero"),
        ({}, "no input scale"),
        *(({"scale": groups}, "do not fit") for groups in ((3, 1), (4,), (0, 1), (4, 0), (4, 4))),
        ({"scale": (2, 3)}, "do not fit"),
    ],
)
def test_parts_that_are_not_known_or_do_not_fit(
    parts: dict[str, tuple[int, ...]], message: str
) -> None:
    values = {name: immediate(np.ones(shape, np.float16)) for name, shape in parts.items()}
    values["data"] = immediate(np.ones((4, 6), np.int8))
    type = TensorType("float16", (4, 6))
    asked = operation("constexpr_blockwise_shift_scale", values, {"w": type})
    with pytest.raises(Unsupported, match=message):
        compressed_weight(package(main([], {}, [])), asked, WeightCache())
