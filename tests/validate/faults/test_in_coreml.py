"""Faults planted in Core ML packages: each fails, and its layer and site are named."""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from rgexport.errors import RequestError
from rgexport.griffin.checkpoint import open_checkpoint
from tests.export.mil.package_edits import drop_write
from tests.validate.faults.conftest import CONFIG, Copy, Judge, export, require_named
from tests.validate.faults.mil_edits import (
    Change,
    claim_config,
    in_half,
    reads,
    spoil,
    with_operand,
)

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="Core ML itself rounds otherwise than the interpreter"
)
ATTENTION = "layers.2.temporal_block.attention"
MASK = "layers_2_temporal_block_attention_less_equal"
LRU, LRU_NAME = "temporal_block.rg_lru", "temporal_block_rg_lru"
PROGRAM: dict[str, tuple[Change, str]] = {
    "soft cap skipped": (reads("logits", "x", "logits_mul"), "logits"),
    "window one less": (with_operand(MASK, "y", CONFIG.window - 1), ATTENTION),
    "window one more": (with_operand(MASK, "y", CONFIG.window + 1), ATTENTION),
    "embedding scale not rounded": (
        with_operand("embed_tokens", "y", CONFIG.width**0.5),
        "embed_tokens",
    ),
    "input gate in fp16": (
        in_half(f"layers_3_{LRU_NAME}_input_gate"),
        f"layers.3.{LRU}.input_gate",
    ),
    "recurrence gate in fp16": (
        in_half(f"layers_1_{LRU_NAME}_recurrent_gate"),
        f"layers.1.{LRU}.recurrent_gate",
    ),
}
"""What is done to a program, and the site that is to be named."""
STATES: dict[str, dict[str, tuple[str, str]]] = {
    "fp32": {"key": ("layers_2_key_hi", ATTENTION)},
    "int4": {
        "key": ("layers_2_key", ATTENTION),
        "conv1d": ("layers_1_conv1d", "layers.1.temporal_block.conv_1d"),
    },
}
"""Precision → state → its name in the program (of a pair, the larger part), and its site."""


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("fault", PROGRAM)
def test_a_wrong_program(copy: Copy, judge: Judge, fault: str, precision: str) -> None:
    change, site = PROGRAM[fault]
    artifact = copy(f"coreml-{precision}")
    spoil(artifact, change)
    require_named(judge(artifact), site)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_rope_on_all_dims(original: Path, tmp_path: Path, judge: Judge, precision: str) -> None:
    """The program was built for it; the artifact says that it was not."""
    wrong = dataclasses.replace(CONFIG, rope_dims=CONFIG.head_dim)
    checkpoint = dataclasses.replace(open_checkpoint(original), config=wrong)
    artifact = export(f"coreml-{precision}", checkpoint, tmp_path / "artifact")
    claim_config(artifact, CONFIG)
    require_named(judge(artifact), "layers.2.temporal_block.rope_q")


@pytest.mark.parametrize(
    ("precision", "state"), [(p, state) for p, states in STATES.items() for state in states]
)
def test_a_state_that_is_not_written(copy: Copy, judge: Judge, precision: str, state: str) -> None:
    """What was read is written back; without a write the program is refused at once."""
    name, site = STATES[precision][state]
    artifact = copy(f"coreml-{precision}")
    read = f"{name.removesuffix('_hi')}_read_state"
    spoil(artifact, reads(f"{name}_write_write_state", "data", read))
    require_named(judge(artifact), site)
    spoil(artifact, drop_write(name, "decode"))
    with pytest.raises(RequestError, match=f"state {name} is never written"):
        judge(artifact)
