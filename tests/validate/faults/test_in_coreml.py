"""Faults planted in Core ML packages: each fails, and its layer and site are named."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

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


def test_a_wrong_program(copy, judge):
    artifact = copy("coreml-int4")
    spoil(artifact, reads("logits", "x", "logits_mul"))  # skips the soft cap
    require_named(judge(artifact), "logits")


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
