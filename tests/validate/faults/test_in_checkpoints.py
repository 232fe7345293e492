"""Faults planted in checkpoints: each is exported as it is and compared with the sound one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rgexport.griffin.checkpoint import open_checkpoint
from tests.models import write_hugging_face
from tests.validate.faults.conftest import (
    CONFIG,
    KINDS,
    case,
    export,
    failed,
    require_named,
    sound_weights,
)

pytestmark = pytest.mark.full
Change = Callable[[np.ndarray], object]


def _larger(weight: np.ndarray) -> None:
    weight *= np.float32(1.02)


def _transposed(blocks: np.ndarray) -> None:
    blocks[-1] = blocks[-1].T.copy()


LRU = "temporal_block.rg_lru"
WEIGHTS: dict[str, tuple[Change, str]] = {
    "embed_tokens.weight": (_larger, "embed_tokens"),
    "layers.1.mlp_block.up_proj.weight": (_larger, "layers.1.mlp_block.up_proj"),
    "layers.2.temporal_block.k_proj.weight": (_larger, "layers.2.temporal_block.k_proj"),
    "layers.0.temporal_block.linear_out.bias": (_larger, "layers.0.temporal_block.linear_out"),
    "layers.0.temporal_block.conv_1d.weight": (_larger, "layers.0.temporal_block.conv_1d"),
    f"layers.1.{LRU}.recurrent_param": (_larger, f"layers.1.{LRU}"),
    f"layers.3.{LRU}.input_gate_weight": (_transposed, f"layers.3.{LRU}.input_gate"),
    f"layers.0.{LRU}.recurrent_gate_weight": (_transposed, f"layers.0.{LRU}.recurrent_gate"),
    "final_norm.weight": (_larger, "final_norm"),
}
"""Tensor → what is done to it, and the site that uses it."""
UP = "layers.1.mlp_block.up_proj.weight"
FORMATS = [
    *(case("onnx-int4", name) for name in WEIGHTS),
    *(case(kind, UP) for kind in ("onnx-fp32", "gguf-int4", "coreml-int4")),
]


@pytest.mark.parametrize("kind", map(case, KINDS))
def test_a_sound_one_passes(clean, judge, kind):
    result = judge(clean(kind))
    assert (result.verdict, result.suspects) == ("PASS", [])
    lengths = {error.length for error in result.sites.errors}
    assert min(lengths) == 1 < max(lengths)
    assert all(site.endswith((".gelu", "last_tokens")) for site in result.sites.unseen)


@pytest.mark.parametrize(("kind", "name"), FORMATS)
def test_a_wrong_weight(tmp_path, judge, kind, name):
    weights, (change, site) = sound_weights(), WEIGHTS[name]
    change(weights[name])
    model = write_hugging_face(CONFIG, weights, tmp_path / "model", dtype="bfloat16")
    result = judge(export(kind, open_checkpoint(model), tmp_path / "artifact"))
    require_named(result, site)
    # Clip search may be off by any number of steps where it clips, so rows are compared there.
    checks = {"max_steps", "projection"} if "int4" in kind else {"max_steps"}
    assert {f"weights.{name}.{check}" for check in checks} & set(failed(result))
    assert result.source.same_files is False
    assert result.sites.first is None, "the graph is right"


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"window": CONFIG.window - 1}, "layers.2.temporal_block.attention"),
    "soft_cap": ({"soft_cap": 0.0}, "logits"),
    "embedding_scale": ({"embedding_scale": CONFIG.width**0.5}, "embed_tokens"),
    "rope_dims": ({"rope_dims": CONFIG.head_dim}, "layers.2.temporal_block.rope_q"),
}
"""Field → what it is read as, and the site that it decides about."""


@pytest.mark.parametrize("field", CONFIGS)
def test_a_wrong_configuration(original, tmp_path, judge, field):
    """The weights are the same, and their hashes."""
    changed, site = CONFIGS[field]
    checkpoint = open_checkpoint(original)
    wrong = dataclasses.replace(checkpoint, config=dataclasses.replace(CONFIG, **changed))
    result = judge(export("onnx-int4", wrong, tmp_path / "artifact"))
    require_named(result, site)
    (difference,) = result.source.config_differences
    assert difference.startswith(f"{field}: ")
    assert difference in result.suspects[0].evidence
    assert result.source.same_files is True
