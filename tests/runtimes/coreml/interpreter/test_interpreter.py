"""How the interpreter runs programs, and what it refuses to open."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from rgexport.errors import RequestError
from rgexport.export.mil.program import Name, Operation, TensorType
from tests.runtimes.coreml.interpreter.mil_programs import Blobs, immediate, main, opened, operation

X = TensorType("float32", (1, 4))
HALF = TensorType("float16", (1, 4))


def write(state: str, data: str) -> Operation:
    return operation("write_state", {"input": Name(state), "data": Name(data)}, {})


def read(state: str, output: str, type: TensorType = HALF) -> Operation:
    return operation("read_state", {"input": Name(state)}, {output: type})


def add(x: str, y: str, output: str, type: TensorType = HALF) -> Operation:
    return operation("add", {"x": Name(x), "y": Name(y)}, {output: type})


def gather(output: str, given: dict[str, Any], batch_dims: int = 0, **more: Any) -> Operation:
    more |= {"batch_dims": batch_dims, "validate_indices": False}
    return operation("gather", given, {output: X}, **more)


def test_states_are_read_and_written_in_the_order_of_the_program() -> None:
    program = [
        read("s", "before"),
        add("before", "x", "sum"),
        write("s", "sum"),
        read("s", "after"),
        add("before", "after", "y"),
    ]
    run = opened(main(program, {"x": HALF}, ["y"], {"s": HALF}))
    states = {"s": np.full((1, 4), 2, np.float16)}
    kept = states["s"]
    x = np.arange(4, dtype=np.float16)[None]
    assert run({"x": x}, states)["y"].tolist() == [[4, 5, 6, 7]]
    assert states["s"].tolist() == [[2, 3, 4, 5]]
    assert kept.tolist() == [[2, 2, 2, 2]], "the old array must not change"
    assert run({"x": x}, states)["y"].tolist() == [[4, 7, 10, 13]]


def test_every_float16_value_is_rounded() -> None:
    """2048 + 1 + 1 is 2048 in float16, and 2050 if the sum between is not rounded."""
    one = np.ones((1, 4), np.float16)
    program = [add("x", "one", "a"), add("a", "one", "y")]
    run = opened(main(program, {"x": HALF, "one": HALF}, ["y"]))
    assert run({"x": one * 2048, "one": one}, {})["y"].tolist() == [[2048] * 4]


def test_values_are_forgotten_after_their_last_use() -> None:
    """A chain of a thousand sums of 1 MB each."""
    type = TensorType("float32", (1 << 18,))
    program = [add(f"v{i}", f"v{i}", f"v{i + 1}", type) for i in range(1000)]
    run = opened(main(program, {"v0": type}, ["v1000"]))
    tracemalloc.start()
    run({"v0": np.zeros(type.shape, np.float32)}, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_values_on_the_way_can_be_asked_for() -> None:
    one = np.ones((1, 4), np.float16)
    program = [add("x", "x", "a"), add("a", "x", "b"), add("b", "x", "y")]
    run = opened(main(program, {"x": HALF}, ["y"]), also=["a", "y", "nothing"])
    found = run({"x": one}, {})
    assert {name: array.tolist() for name, array in found.items()} == {
        "y": [[4] * 4],
        "a": [[2] * 4],
    }


def test_a_large_constant_of_any_parameter(tmp_path: Path) -> None:
    """Weights in files serve every operation, not only those that read them in slabs."""
    blobs = Blobs(tmp_path)
    array = np.random.default_rng(0).standard_normal((200, 200)).astype(np.float16)
    value = blobs.add(array)
    path = blobs.close()
    const = Operation("const", "w", {}, (("w", value.type),), {"val": value})
    x = np.ones((1, 200), np.float16)

    def run(kind: str, given: dict[str, Any], rows: int, **constants: Any) -> np.ndarray:
        last = operation(kind, given, {"y": TensorType("float16", (rows, 200))}, **constants)
        function = main([const, last], {"x": TensorType("float16", (1, 200))}, ["y"])
        return opened(function, weights=path)({"x": x}, {})["y"]

    both = run("concat", {"values": [Name("x"), Name("w")]}, 201, axis=0, interleave=False)
    np.testing.assert_array_equal(both, np.concatenate([x, array]))
    straight = {"transpose_x": False, "transpose_y": False}
    product = run("matmul", {"x": Name("x"), "y": Name("w")}, 1, **straight)
    expected = (x.astype(np.float32) @ array.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(product, expected)


def refused(operations: Sequence[Operation], outputs: Sequence[str] = ("y",), **more: Any) -> str:
    with pytest.raises(RequestError) as caught:
        opened(main(operations, {"x": X}, outputs, **more))
    message = str(caught.value)
    assert "\n" not in message and "made.mlpackage: main" in message
    return message


SMALL = immediate(np.ones((1, 4), np.int8))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            [operation("conv", {"x": Name("x")}, {"y": X})],
            "conv y cannot be executed: it is no operation",
        ),
        ([operation("constexpr_cast", {"x": Name("x")}, {"y": X})], "it is no operation"),
        (  # which may change what the operation does
            [operation("tanh", {"x": Name("x")}, {"y": X}, slope=np.float32(2))],
            "it has the input slope, which is not known",
        ),
        (  # as in iOS 16: parts as attributes instead of inputs
            [Operation("constexpr_lut_to_dense", "y", {}, (("y", X),), {"lut": SMALL})],
            "it has no input indices",
        ),
        ([add("x", "x", "y", HALF)], "it gives float16 of float32"),
        ([operation("add", {"x": Name("x")}, {"y": X})], "add y cannot be executed: it has no"),
        ([add("x", "z", "y", X)], "nothing computes z before it"),
        ([add("x", "y", "y", X)], "nothing computes y before it"),
        ([add("x", "x", "x", X)], "x is computed twice"),
        ([read("s", "y", X)], "s is no state"),
        ([write("x", "x")], "x is no state"),
        ([add("x", "x", "z", X)], "nothing computes the output y"),
        ([operation("cast", {"x": Name("x")}, {"y": X}, dtype="fp8")], "it casts to fp8"),
        ([operation("gelu", {"x": Name("x")}, {"y": X}, mode="FAST")], "its mode is FAST"),
        (
            [operation("concat", {"values": [Name("x")]}, {"y": X}, axis=0, interleave=True)],
            "it is interleaved",
        ),
        ([gather("y", {"x": Name("x")}, 1, indices=[[0]], axis=1)], "it gathers from each of a"),
        ([operation("softmax", {"x": Name("x"), "axis": Name("x")}, {"y": X})], "axis is computed"),
        ([operation("transpose", {"x": Name("x")}, {"y": X})], "it has no input perm"),
        (
            [operation("concat", {"values": ()}, {"y": X}, axis=0, interleave=False)],
            "it has no input values",
        ),
        ([operation("add", {"x": Name("x"), "y": Name("x")}, {})], "it has 0 outputs"),
        ([Operation("const", "y", {}, (("y", X),))], "const y cannot be executed: it has no value"),
        ([Operation("add", "y", {}, (("y", X),), {}, ((),))], "it has blocks of its own"),
    ],
)
def test_what_cannot_be_executed(program: list[Operation], expected: str) -> None:
    assert expected in refused(program)


@pytest.mark.parametrize(
    ("last", "outputs", "complaint"),
    [
        (add("x", "x", "y", TensorType("float32", (4,))), ["y"], r"add y .* float32 \(1, 4\)"),
        (
            operation("reshape", {"x": Name("x")}, {"y": HALF}, shape=[1, 4]),
            ["y"],
            "reshape y failed: it gave float32",
        ),
        (write("s", "x"), [], "write_state write_state failed: it gave float32"),
    ],
    ids=["shape", "dtype", "state"],
)
def test_another_result_than_declared_is_noticed(
    last: Operation, outputs: list[str], complaint: str
) -> None:
    run = opened(main([last], {"x": X}, outputs, {"s": HALF}))
    with pytest.raises(RequestError, match=complaint):
        run({"x": np.zeros((1, 4), np.float32)}, {"s": np.zeros((1, 4), np.float16)})


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_an_error(index: int) -> None:
    """Core ML says that what it gives is undefined, so no program may rely on it."""
    ids = TensorType("int32", (1,))
    program = [gather("y", {"indices": Name("ids")}, x=np.zeros(4, np.float32), axis=0)]
    run = opened(main(program, {"ids": ids}, ["y"]))
    with pytest.raises(RequestError, match="gather y failed: an index"):
        run({"ids": np.array([index], np.int32)}, {})


def test_inputs_of_another_shape() -> None:
    run = opened(main([add("x", "x", "y", X)], {"x": X}, ["y"]))
    with pytest.raises(RequestError, match=r"input x is \(2, 4\); expected float32 \[1, 4\]"):
        run({"x": np.zeros((2, 4), np.float32)}, {})


def test_a_weight_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    value = blobs.add(np.ones((200, 200), np.float32))
    path = blobs.close()
    const = Operation("const", "w", {}, (("w", value.type),), {"val": value})
    type = TensorType("float32", (1, 200))
    program = [const, operation("linear", {"x": Name("x"), "weight": Name("w")}, {"y": type})]
    run = opened(main(program, {"x": type}, ["y"]), weights=path)
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(RequestError, match="too early"):
        run({"x": np.ones((1, 200), np.float32)}, {})
