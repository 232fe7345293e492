"""What coremltools' inference is asked, and what it must refuse."""

import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from rgexport.export.mil.inference import OPERATIONS, exists, result_types
from rgexport.export.mil.operand import Misfit, Operand
from rgexport.export.mil.program import UNKNOWN, TensorType
from tests.export.coreml.test_model import OPS


def test_all_that_the_exporter_makes_is_checked() -> None:
    assert OPERATIONS | {"const"} == set(OPS.split())
    assert all(map(exists, OPERATIONS)) and exists("conv") and not exists("custom_layer")


def value(dtype: str, *shape: int) -> tuple[Operand, ...]:
    return (Operand(TensorType(dtype, shape)),)


def fixed(content: Any, dtype: str = "int32") -> tuple[Operand, ...]:
    """A small constant that stands in the program."""
    array = np.array(content)
    known = tuple(array.reshape(-1).tolist())
    return (Operand(TensorType(dtype, array.shape), constant=True, known=known),)


def stored(dtype: str, *shape: int) -> tuple[Operand, ...]:
    """A constant in a file of weights."""
    return (Operand(TensorType(dtype, shape), constant=True),)


def state(dtype: str, *shape: int) -> tuple[Operand, ...]:
    return (Operand(TensorType(dtype, shape), state=True),)


X = value("float32", 2, 3)
SLICE: dict[str, tuple[Operand, ...]] = {"x": X, "begin": fixed([0, 1]), "end": fixed([2, 3])}
RESULTS: dict[str, tuple[str, dict[str, tuple[Operand, ...]], list[TensorType]]] = {
    "stretched": ("add", {"x": X, "y": value("float32")}, [TensorType("float32", (2, 3))]),
    "compared": ("equal", {"x": X, "y": X}, [TensorType("bool", (2, 3))]),
    "linear": (
        "linear",
        {"x": X, "weight": stored("float32", 4, 3)},
        [TensorType("float32", (2, 4))],
    ),
    "gather": (
        "gather",
        {"x": stored("float16", 9, 4), "indices": value("int32", 1, 5), "axis": fixed(0)},
        [TensorType("float16", (1, 5, 4))],
    ),
    "cast": (
        "cast",
        {"x": X, "dtype": fixed("fp16", "string")},
        [TensorType("float16", (2, 3))],
    ),
    "slice": ("slice_by_index", SLICE, [TensorType("float32", (2, 2))]),
    "slice whose place is computed": (
        "slice_by_index",
        SLICE | {"begin": value("int32", 2)},
        [TensorType("float32", (UNKNOWN, UNKNOWN))],
    ),
    "blocks": (
        "constexpr_blockwise_shift_scale",
        {"data": stored("int4", 4, 64), "scale": stored("float16", 4, 2)},
        [TensorType("float16", (4, 64))],
    ),
    "table": (
        "constexpr_lut_to_dense",
        {"indices": stored("uint4", 4, 8), "lut": stored("float16", 2, 1, 16, 1)},
        [TensorType("float16", (4, 8))],
    ),
    "read": ("read_state", {"input": state("float16", 1, 32)}, [TensorType("float16", (1, 32))]),
    "write": (
        "write_state",
        {"input": state("float16", 1, 32), "data": value("float16", 1, 32)},
        [],
    ),
}


@pytest.mark.parametrize("case", RESULTS)
def test_types(case: str) -> None:
    kind, given, expected = RESULTS[case]
    assert result_types(kind, given) == expected


MISFITS: dict[str, tuple[str, dict[str, tuple[Operand, ...]], str]] = {
    "no operand": ("exp", {}, "it has no input x"),
    "two operands": ("exp", {"x": X + X}, "its input x has 2 values"),
    "foreign operand": ("exp", {"x": X, "z": X}, "no input 'z'; expected x"),
    "operand of the builder": ("exp", {"x": X, "before_op": X}, "no input 'before_op'"),
    "wrong dtype": ("exp", {"x": value("int32", 2)}, r"expects .*fp16.* but got .*int32"),
    "two dtypes": ("add", {"x": X, "y": value("float16", 1)}, "must have the same data type"),
    "no common shape": ("add", {"x": X, "y": value("float32", 2)}, "Incompatible dim"),
    "state as value": ("exp", {"x": state("float16", 2)}, "refuses it"),
    "value as state": ("read_state", {"input": X}, "expects StateInputType"),
    "state of another shape": (
        "write_state",
        {"input": state("float16", 1, 32), "data": value("float16", 1, 31)},
        r"data are float16 \[1, 31\]; expected float16 \[1, 32\]",
    ),
    "state of another dtype": (
        "write_state",
        {"input": state("float16", 1, 32), "data": value("float32", 1, 32)},
        "data are float32",
    ),
    "value that is written": ("write_state", {"input": X, "data": X}, "expected a state"),
    "write of nothing": ("write_state", {"input": state("float16", 1, 32)}, "and data"),
    "computed axes": ("reduce_sum", {"x": X, "axes": value("int32", 1)}, "must be const"),
    "axes in a file": ("reduce_sum", {"x": X, "axes": stored("int32", 1)}, "a small value"),
    "axis outside": ("softmax", {"x": X, "axis": fixed(2)}, "there are 2 axes"),
    "axis twice": ("reduce_sum", {"x": X, "axes": fixed([1, -1])}, "refuses it"),
    "axes as matrix": ("reduce_sum", {"x": X, "axes": fixed([[1]])}, "refuses it"),
    "axis of a concat": ("concat", {"values": X + X, "axis": fixed(2)}, "refuses it"),
    "axis of a gather": (
        "gather",
        {"x": X, "indices": value("int32", 5), "axis": fixed(2)},
        "refuses it",
    ),
    "reshape": ("reshape", {"x": X, "shape": fixed([4])}, "refuses it"),
    "reshape, odd": ("reshape", {"x": X, "shape": fixed([4, -1])}, "refuses it"),
    "reshape, twice -1": ("reshape", {"x": X, "shape": fixed([-1, -1])}, "refuses it"),
    "short perm": ("transpose", {"x": X, "perm": fixed([0])}, "refuses it"),
    "perm outside": ("transpose", {"x": X, "perm": fixed([0, 2])}, "refuses it"),
    "perm twice": ("transpose", {"x": X, "perm": fixed([1, 1])}, "each of 2 axes once"),
    "empty slice": ("slice_by_index", SLICE | {"begin": fixed([0, 3])}, "which is nothing"),
    "short begin": ("slice_by_index", SLICE | {"begin": fixed([0])}, "refuses it"),
    "no step, masked": (
        "slice_by_index",
        SLICE | {"stride": fixed([0, 0]), "end_mask": fixed([True, True], "bool")},
        "which is nothing",
    ),
    "scalar softmax": ("softmax", {"x": value("float32")}, "there are 0 axes"),
    "dtype that no value has": ("exp", {"x": value("bfloat16", 2)}, "refuses it"),
    "no step": ("slice_by_index", SLICE | {"stride": fixed([1, 0])}, "which is nothing"),
    "concat": ("concat", {"values": X + value("float32", 3, 3), "axis": fixed(1)}, "refuses it"),
    "concat, dtypes": (
        "concat",
        {"values": X + value("float16", 2, 3), "axis": fixed(0)},
        "refuses it",
    ),
    "concat of nothing": ("concat", {"values": (), "axis": fixed(1)}, "no input values"),
    "gather": (
        "gather",
        {"x": X, "indices": value("int32", 5), "axis": fixed(1), "batch_dims": fixed(1)},
        "batch_dims is 1",
    ),
    "gather, dtype": ("gather", {"x": X, "indices": X, "axis": fixed(1)}, "expects"),
    "cast": ("cast", {"x": X, "dtype": fixed("fp64", "string")}, "fp64"),
    "gelu": ("gelu", {"x": X, "mode": fixed("TANH", "string")}, "refuses it"),
    "linear": ("linear", {"x": X, "weight": stored("float32", 4, 2)}, "refuses it"),
    "linear, rank": ("linear", {"x": X, "weight": stored("float32", 4, 1, 3)}, "refuses it"),
    "bias": (
        "linear",
        {"x": X, "weight": stored("float32", 4, 3), "bias": stored("float32", 3)},
        "refuses it",
    ),
    "computed weight": ("linear", {"x": X, "weight": value("float32", 4, 3)}, "must be const"),
    "matmul": ("matmul", {"x": X, "y": X}, "refuses it"),
    "matmul, dtypes": ("matmul", {"x": X, "y": value("float16", 3, 2)}, "refuses it"),
    "matmul, vector": ("matmul", {"x": X, "y": value("float32", 3)}, "refuses it"),
    "matmul, batches": (
        "matmul",
        {"x": value("float32", 2, 1, 3), "y": value("float32", 3, 3, 1)},
        "refuses it",
    ),
    "blocks": (
        "constexpr_blockwise_shift_scale",
        {"data": stored("int8", 4, 3), "scale": stored("float16", 4, 2)},
        "refuses it",
    ),
    "offset": (
        "constexpr_blockwise_shift_scale",
        {
            "data": stored("int8", 4, 3),
            "scale": stored("float16", 4, 1),
            "offset": stored("uint8", 4, 1),
        },
        "refuses it",
    ),
    "offset, shape": (
        "constexpr_blockwise_shift_scale",
        {
            "data": stored("int8", 4, 3),
            "scale": stored("float16", 4, 1),
            "offset": stored("int8", 4, 3),
        },
        "refuses it",
    ),
    "short table": (
        "constexpr_lut_to_dense",
        {"indices": stored("uint4", 4, 2), "lut": stored("float16", 1, 1, 8, 1)},
        "refuses it",
    ),
    "table of another rank": (
        "constexpr_lut_to_dense",
        {"indices": stored("uint4", 4, 2), "lut": stored("float16", 1, 16, 1)},
        "refuses it",
    ),
    "too large for any memory": (
        "linear",
        {"x": X, "weight": stored("float32", 2**31 - 1, 3)},
        "too large",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfit(case: str) -> None:
    kind, given, complaint = MISFITS[case]
    with pytest.raises(Misfit, match=complaint) as caught:
        result_types(kind, given)
    assert "\n" not in str(caught.value)


def test_what_is_not_inferred() -> None:
    assert result_types("exp", {"x": value("float32", 2, UNKNOWN)}) is None
    assert result_types("conv", {"x": X}) is None


LARGE: dict[str, tuple[str, dict[str, tuple[Operand, ...]]]] = {
    "linear": (
        "linear",
        {"x": value("float16", 1, 1 << 31), "weight": stored("float16", 1 << 10, 1 << 31)},
    ),
    "blocks": (
        "constexpr_blockwise_shift_scale",
        {"data": stored("int4", 1 << 28, 1 << 20), "scale": stored("float16", 1 << 28, 1 << 10)},
    ),
    "table": (
        "constexpr_lut_to_dense",
        {
            "indices": stored("uint4", 1 << 28, 1 << 20),
            "lut": stored("float16", 1 << 28, 1, 16, 1),
        },
    ),
    "sum of constants": (
        "add",
        {"x": stored("float32", 1 << 20, 1), "y": stored("float32", 1, 1 << 20)},
    ),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_weight_takes_no_memory(case: str) -> None:
    kind, given = LARGE[case]
    exists(kind)  # loads coremltools
    tracemalloc.start()
    assert result_types(kind, given)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


LOOK = """
import sys
from rgexport.export.mil.messages import messages
ours = messages("Model").Model
assert not {"coremltools", "torch"} & sys.modules.keys()
from coremltools.proto.Model_pb2 import Model
assert Model is ours
"""


def test_messages_are_coremltools_own_and_are_loaded_without_it() -> None:
    subprocess.run([sys.executable, "-c", LOOK], check=True)
