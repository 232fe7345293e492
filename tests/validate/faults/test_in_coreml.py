"""Faults planted in Core ML packages: each fails, and its layer and site are named."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from coremltools.proto.MIL_pb2 import Operation
from coremltools.proto.Model_pb2 import Model

from rgexport.errors import RequestError
from rgexport.export.coreml.package import PACKAGE
from tests.export.mil.package_edits import block, drop_write, edit, in_both, name_of
from tests.validate.conftest import claim
from tests.validate.faults.conftest import require_named

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        sys.platform == "darwin", reason="Core ML itself rounds otherwise than the interpreter"
    ),
]
FLOAT16, FLOAT32 = 10, 11
"""Numbers of `DataType` in MIL.proto."""
Change = Callable[[Model], object]


def spoil(artifact: Path, change: Change) -> None:
    """Edits the program of an artifact's package; its hashes are made to fit."""
    edit(change)(artifact / PACKAGE)
    claim(artifact)


def reads(name: str, parameter: str, value: str) -> Change:
    """Makes an operation read another value, in both functions."""

    def change(model: Model, function: str) -> None:
        operations = block(model, function).operations
        operation = next(one for one in operations if name_of(one) == name)
        operation.inputs[parameter].arguments[0].name = value

    return in_both(change)


def in_half(value: str) -> Change:
    """Rounds a float32 value to float16 and back."""

    def change(model: Model, function: str) -> None:
        operations = block(model, function).operations
        index = [name_of(operation) for operation in operations].index(value)
        half = _cast(operations, index, f"{value}_exact", f"{value}_half", FLOAT16)
        back = _cast(operations, index, f"{value}_half", value, FLOAT32)
        _rename(operations[index], f"{value}_exact")
        operations.insert(index + 1, half)
        operations.insert(index + 2, back)

    return in_both(change)


def _cast(
    operations: Sequence[Operation], index: int, value: str, name: str, dtype: int
) -> Operation:
    """A cast of a value that has the shape of operation `index`, copied from an earlier cast."""
    types = [one.outputs[0].type.tensorType.dataType for one in operations[:index]]
    pairs = zip(operations, types, strict=False)
    cast = Operation()
    cast.CopyFrom(next(one for one, type in pairs if one.type == "cast" and type == dtype))
    cast.inputs["x"].arguments[0].name = value
    _rename(cast, name)
    cast.outputs[0].type.CopyFrom(operations[index].outputs[0].type)
    cast.outputs[0].type.tensorType.dataType = dtype
    return cast


def _rename(operation: Operation, name: str) -> None:
    operation.attributes["name"].immediateValue.tensor.strings.values[0] = name
    operation.outputs[0].name = name


@pytest.mark.parametrize(
    ("change", "site"),
    [
        (reads("logits", "x", "logits_mul"), "logits"),
        (
            in_half("layers_1_temporal_block_rg_lru_recurrent_gate"),
            "layers.1.temporal_block.rg_lru.recurrent_gate",
        ),
    ],
    ids=["soft cap skipped", "recurrence gate in fp16"],
)
def test_a_wrong_program(copy, judge, change, site):
    artifact = copy("coreml-int4")
    spoil(artifact, change)
    require_named(judge(artifact), site)


@pytest.mark.parametrize(
    ("precision", "name", "site"),
    [
        ("fp32", "layers_2_key_hi", "layers.2.temporal_block.attention"),  # the larger of a pair
        ("int4", "layers_1_conv1d", "layers.1.temporal_block.conv_1d"),
    ],
)
def test_a_state_that_is_not_written(copy, judge, precision, name, site):
    """What was read is written back; without a write the program is refused at once."""
    artifact = copy(f"coreml-{precision}")
    read = f"{name.removesuffix('_hi')}_read_state"
    spoil(artifact, reads(f"{name}_write_write_state", "data", read))
    require_named(judge(artifact), site)
    spoil(artifact, drop_write(name, "decode"))
    with pytest.raises(RequestError, match=f"state {name} is never written"):
        judge(artifact)
