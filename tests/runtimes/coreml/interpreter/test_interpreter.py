"""How the interpreter runs programs, what it refuses to open, and compressed weights.

Weights are written by Apple's library, and compared with coremltools' own decompression.
"""

import tracemalloc

import numpy as np
import psutil
import pytest

pytest.importorskip("coremltools")

from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression
from coremltools.libmilstoragepython import _BlobStorageWriter

from rgexport.artifacts.coreml.mil.program import (
    BITS,
    FileValue,
    Name,
    Operation,
    TensorType,
    numpy_type,
)
from rgexport.errors import RequestError
from rgexport.runtimes.coreml.interpreter import weights
from tests.runtimes.coreml.interpreter.mil_programs import (
    FILE,
    immediate,
    main,
    opened,
    operation,
    package,
)

X = TensorType("float32", (1, 4))
HALF = TensorType("float16", (1, 4))


def stored(folder, *arrays):
    """Writes arrays, of dtypes that numpy may not have, by Apple's own library."""
    path, values = folder / "weight.bin", []
    writer = _BlobStorageWriter(str(path))
    for array, dtype in arrays:
        flat = np.ascontiguousarray(array).reshape(-1)
        if dtype == "float16":
            flat = flat.view(np.uint16)
        elif (bits := getattr(types, f"np_{dtype}_dtype", None)) is not None:
            flat = flat.astype(bits)
        word = {"float32": "float", "float16": "fp16"}.get(dtype, dtype)
        offset = getattr(writer, f"write_{word}_data")(flat)
        values.append(FileValue(TensorType(dtype, array.shape), FILE, offset))
    return path, values


def random_elements(dtype, shape):
    """All values of an integer dtype, or floats."""
    random, held = np.random.default_rng(0), numpy_type(dtype)
    if held.kind == "f":
        return random.uniform(-1, 1, shape).astype(held)
    low = -(1 << BITS[dtype] - 1) if held.kind == "i" else 0
    return random.integers(low, low + (1 << BITS[dtype]), shape).astype(held)


def add(x, y, output, type=HALF):
    return operation("add", {"x": Name(x), "y": Name(y)}, {output: type})


def test_every_float16_value_is_rounded():
    """2048 + 1 + 1 is 2048 in float16, and 2050 if the sum between is not rounded."""
    one = np.ones((1, 4), np.float16)
    program = [add("x", "one", "a"), add("a", "one", "y")]
    run = opened(main(program, {"x": HALF, "one": HALF}, ["y"]), also=["a", "y", "nothing"])
    results = run({"x": one * 2048, "one": one}, {})
    assert {name: array.tolist() for name, array in results.items()} == {
        "a": [[2048] * 4],
        "y": [[2048] * 4],
    }


def test_values_are_forgotten_after_their_last_use():
    type = TensorType("float32", (1 << 18,))
    program = [add(f"v{i}", f"v{i}", f"v{i + 1}", type) for i in range(100)]
    run = opened(main(program, {"v0": type}, ["v100"]))
    tracemalloc.start()
    run({"v0": np.zeros(type.shape, np.float32)}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_weight_file_that_shrinks_while_it_is_open(tmp_path):
    """Large constants serve every operation, not only those that read them in slabs."""
    array = np.random.default_rng(0).standard_normal((200, 200)).astype(np.float16)
    path, (value,) = stored(tmp_path, (array, "float16"))
    x, y = TensorType("float16", (1, 200)), TensorType("float16", (201, 200))
    values = {"values": [Name("x"), Name("w")]}
    program = [
        Operation("const", "w", {}, (("w", value.type),), {"val": value}),
        operation("concat", values, {"y": y}, axis=0, interleave=False),
    ]
    run, later = (opened(main(program, {"x": x}, ["y"]), weights=path) for _ in range(2))
    x = np.ones((1, 200), np.float16)
    np.testing.assert_array_equal(run({"x": x}, {})["y"], np.concatenate([x, array]))
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(RequestError, match="bytes early"):
        later({"x": x}, {})


GIVEN_X = {"x": Name("x")}
WRITTEN = {"input": Name("s"), "data": Name("x")}
LUT = {"lut": immediate(np.ones((1, 4), np.int8))}


@pytest.mark.parametrize(
    ("last", "complaint"),
    [
        (operation("conv", GIVEN_X, {"y": X}), "conv y cannot be executed: it is no operation"),
        (operation("tanh", GIVEN_X, {"y": X}, slope=np.float32(2)), "has the input slope, which"),
        # as in iOS 16: parts as attributes instead of inputs
        (Operation("constexpr_lut_to_dense", "y", {}, (("y", X),), LUT), "has no input indices"),
        (add("x", "x", "y", HALF), "it gives float16 of float32"),
        (operation("reshape", GIVEN_X, {"y": HALF}, shape=[1, 4]), "it gives float16 of float32"),
        (operation("cast", GIVEN_X, {"y": HALF}, dtype="fp32"), "it casts to fp32 and gives"),
        (operation("write_state", WRITTEN, {}), "it writes float32 [1, 4] into float16 [1, 4]"),
        (add("x", "z", "y", X), "nothing computes z before it"),
        (add("x", "x", "x", X), "x is computed twice"),
        (operation("read_state", {"input": Name("t")}, {"y": X}), "t is no state"),
        (add("x", "x", "z", X), "nothing computes the output y"),
        (operation("constexpr_cast", GIVEN_X, {"y": X}), "it is no operation"),
        (operation("transpose", GIVEN_X, {"y": X}), "it has no input perm"),
        (operation("concat", {"values": [Name("x")]}, {"y": X}, axis=0, interleave=True), "leaved"),
        (operation("cast", GIVEN_X, {"y": X}, dtype="fp8"), "it casts to fp8"),
        (operation("gelu", GIVEN_X, {"y": X}, mode="FAST"), "its mode is FAST"),
        (operation("softmax", GIVEN_X | {"axis": Name("x")}, {"y": X}), "axis is computed"),
        (operation("add", {"x": Name("x"), "y": Name("x")}, {}), "it has 0 outputs"),
        (Operation("const", "y", {}, (("y", X),)), "const y cannot be executed: it has no value"),
        (Operation("add", "y", {}, (("y", X),), {}, ((),)), "it has blocks of its own"),
    ],
)
def test_what_cannot_be_executed(last, complaint):
    with pytest.raises(RequestError) as error:
        opened(main([last], {"x": X}, ["y"], {"s": HALF}))
    message = str(error.value)
    assert complaint in message and "\n" not in message and "made.mlpackage: main" in message


IDS = TensorType("int32", (1,))
TAKEN = {"indices": Name("ids")}
TABLE = {"x": np.zeros(4, np.float32), "axis": 0, "batch_dims": 0, "validate_indices": False}


@pytest.mark.parametrize(
    ("last", "complaint"),
    [
        (add("x", "x", "y", TensorType("float32", (4,))), r"add y .* float32 \(1, 4\)"),
        # Core ML says that what an index outside gives is undefined, so no program may rely on it.
        (operation("gather", TAKEN, {"y": X}, **TABLE), "gather y failed: an index"),
    ],
)
def test_what_fails_at_run_time(last, complaint):
    outputs = [name for name, _ in last.outputs]
    run = opened(main([last], {"x": X, "ids": IDS}, outputs))
    for index in (-1, 4):
        inputs = {"x": np.zeros((1, 4), np.float32), "ids": np.array([index], np.int32)}
        with pytest.raises(RequestError, match=complaint):
            run(inputs, {})
    with pytest.raises(RequestError, match=r"input x is \(2, 4\); expected float32 \[1, 4\]"):
        run(inputs | {"x": np.zeros((2, 4), np.float32)}, {})


SHIFTED = "constexpr_blockwise_shift_scale"


@pytest.fixture
def slab_of_64_bytes(monkeypatch):
    monkeypatch.setattr(weights, "SLAB_BYTES", 64)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 24)


def compressed(folder, kind, type, parts):
    """A weight whose parts lie in a file."""
    path, values = stored(folder, *parts.values())
    inputs = dict(zip(parts, values, strict=True))
    files, cache = package(main([], {}, []), weights=path), weights.WeightCache()
    return weights.compressed_weight(files, operation(kind, inputs, {"w": type}), cache)


def check(weight, expected):
    """All ways to read a weight give the same."""
    np.testing.assert_array_equal(weight.whole(), expected)
    assert weight.whole().dtype == np.float32
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
def test_shift_and_scale(dtype, result, has_offset, rows, groups, size, tmp_path):
    shape = rows, groups * size
    elements = random_elements(dtype, shape)
    scale = random_elements(result, (rows, groups))
    parts = {"data": (elements, dtype), "scale": (scale, result)}
    offset = None
    if has_offset:
        shifts = random_elements(dtype, (rows, groups))
        parts["offset"] = shifts, dtype
        offset = shifts.astype(np.float32)
    weight = compressed(tmp_path, SHIFTED, TensorType(result, shape), parts)
    oracle = compression.constexpr_blockwise_shift_scale
    exact = oracle.decompress(elements, scale.astype(np.float32), offset)
    check(weight, exact.astype(result))


@pytest.mark.parametrize(("groups", "shape"), [(1, (1, 1)), (3, (15, 9)), (2, (4, 7))])
@pytest.mark.parametrize("result", ["float16", "float32"])
@pytest.mark.parametrize("dtype", ["uint1", "uint2", "uint3", "uint4", "uint6", "uint8"])
@pytest.mark.usefixtures("slab_of_64_bytes")
def test_palette(dtype, result, groups, shape, tmp_path):
    indices = random_elements(dtype, shape)
    lut = random_elements(result, (groups, 1, 1 << BITS[dtype], 1))
    parts = {"indices": (indices, dtype), "lut": (lut, result)}
    weight = compressed(tmp_path, "constexpr_lut_to_dense", TensorType(result, shape), parts)
    check(weight, compression.constexpr_lut_to_dense.decompress(indices, lut, None).astype(result))


ODD_BITS = "uint1", "uint2", "uint3", "uint4", "uint6", "uint8", "int4", "int8"
WHOLE_BYTES = "int16", "uint16", "int32", "uint32", "float16", "float32"


@pytest.mark.parametrize("dtype", [*ODD_BITS, *WHOLE_BYTES])
@pytest.mark.usefixtures("slab_of_64_bytes")
def test_every_dtype_of_a_weight_file(dtype, tmp_path):
    array = random_elements(dtype, (5, 7))
    path, (_, value) = stored(tmp_path, (np.ones(3, np.float32), "float32"), (array, dtype))
    files = package(main([], {}, []), weights=path)
    np.testing.assert_array_equal(weights.whole_constant(files, value), array)
    assert files.blob(value).offset == value.offset + 64
    if dtype.startswith("float"):
        cache = weights.WeightCache()
        check(weights.file_weight(files, value, cache), array)
        both = [weights.file_weight(files, value, cache) for _ in range(2)]
        one, other = (next(iter(weight.slabs()))[2] for weight in both)
        assert one is other, "both functions share what is kept"


def test_rounding_by_bits_equals_two_casts():
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
                np.testing.assert_array_equal(weights.rounded_to_half(signed), expected)


def test_a_large_weight_does_not_stay_in_memory(tmp_path):
    """64 MB of int8 are 256 MB in float32; 16 of them may be kept, and 16 are at hand."""
    rows, columns = 16384, 4096
    path, (data,) = stored(tmp_path, (np.zeros((rows, columns), np.int8), "int8"))
    parts = {"data": data, "scale": immediate(np.ones((rows, 1), np.float16))}
    x, y = (TensorType("float16", (1, size)) for size in (columns, rows))
    program = [
        operation(SHIFTED, parts, {"w": TensorType("float16", (rows, columns))}),
        operation("linear", {"x": Name("x"), "weight": Name("w")}, {"y": y}),
    ]
    run = opened(main(program, {"x": x}, ["y"]), weights=path, cache=16 << 20)
    memory = psutil.Process().memory_info
    before = memory().rss
    assert not run({"x": np.ones((1, columns), np.float16)}, {})["y"].any()
    assert memory().rss - before < 80 << 20
