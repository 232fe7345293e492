"""Faults planted in checkpoints before the export, and in GGUF files and Core ML packages.

Each fails, and its layer and site are named. A GGUF file's graph is llama.cpp's, so only the
metadata can make it wrong.
"""

import sys

import numpy as np
import pytest

from rgexport.artifacts.gguf.naming import ARCHITECTURE
from rgexport.griffin.checkpoint import open_checkpoint
from tests.llama_tools import needs_llama_cpp
from tests.models import write_hugging_face
from tests.validate.conftest import at, claim
from tests.validate.faults.conftest import (
    CONFIG,
    KINDS,
    case,
    export,
    require_named,
    sound_weights,
)

pytestmark = pytest.mark.full
LRU, UP = "temporal_block.rg_lru", "layers.1.mlp_block.up_proj.weight"
SITES = {
    "embed_tokens.weight": "embed_tokens",
    UP: "layers.1.mlp_block.up_proj",
    "layers.0.temporal_block.conv_1d.weight": "layers.0.temporal_block.conv_1d",
    f"layers.1.{LRU}.recurrent_param": f"layers.1.{LRU}",
    f"layers.3.{LRU}.input_gate_weight": f"layers.3.{LRU}.input_gate",
    f"layers.0.{LRU}.recurrent_gate_weight": f"layers.0.{LRU}.recurrent_gate",
    "final_norm.weight": "final_norm",
}
"""Tensor → the site that uses it."""
ATTENTION, CONVOLUTION = "layers.2.temporal_block.attention", "layers.1.temporal_block.conv_1d"


@pytest.mark.parametrize("kind", map(case, KINDS))
def test_a_sound_one_passes(copy, judge, kind):
    result = judge(copy(kind))
    assert (result.verdict, result.suspects) == ("PASS", [])
    lengths = {error.length for error in result.sites.errors}
    assert min(lengths) == 1 < max(lengths)
    assert all(site.endswith((".gelu", "last_tokens")) for site in result.sites.unseen)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(case("onnx-int4", name) for name in SITES),
        *(case(kind, UP) for kind in ("onnx-fp32", "gguf-int4", "coreml-int4")),
    ],
)
def test_a_wrong_weight(tmp_path, judge, kind, name):
    """A block of a gate is transposed, all others are two per cent larger."""
    weights = sound_weights()
    if name.endswith("gate_weight"):
        weights[name][-1] = weights[name][-1].T.copy()
    else:
        weights[name] *= np.float32(1.02)
    model = write_hugging_face(CONFIG, weights, tmp_path / "model", dtype="bfloat16")
    result = judge(export(kind, open_checkpoint(model), tmp_path / "artifact"))
    require_named(result, SITES[name])
    # Clip search may be off by any number of steps where it clips, so rows are compared there.
    checks = {"max_steps", "projection"} if "int4" in kind else {"max_steps"}
    failed = {check.name for check in result.checks if not check.passed}
    assert {f"weights.{name}.{check}" for check in checks} & failed
    assert result.source.same_files is False
    assert result.sites.first is None, "the graph is right"


@needs_llama_cpp
@pytest.mark.parametrize(
    ("key", "value", "site"),
    [
        ("final_logit_softcapping", 0.0, "logits"),
        # llama.cpp's window counts the token too, so this one is one less.
        ("attention.sliding_window", CONFIG.window, ATTENTION),
        ("embedding_scale", CONFIG.width**0.5, "embed_tokens"),
        ("rope.dimension_count", CONFIG.head_dim, "layers.2.temporal_block.rope_q"),
    ],
)
def test_wrong_metadata(copy, judge, key, value, site):
    path = copy("gguf-int4")
    at(f"{ARCHITECTURE}.{key}", value)(path)
    claim(path)
    result = judge(path)
    require_named(result, site)
    assert result.sites.first.site == site
    assert result.structure.reason.startswith(f"the key {ARCHITECTURE}.{key}: ")


@pytest.mark.skipif(
    sys.platform == "darwin", reason="Core ML itself rounds otherwise than the interpreter"
)
@pytest.mark.parametrize(
    ("precision", "reader", "value", "site"),
    [
        ("int4", "logits", "logits_mul", "logits"),  # skips the soft cap
        # A state that is not written: what was read is written back.
        ("fp32", "layers_2_key_hi_write_write_state", "layers_2_key_read_state", ATTENTION),
        ("int4", "layers_1_conv1d_write_write_state", "layers_1_conv1d_read_state", CONVOLUTION),
    ],
)
def test_a_wrong_program(copy, judge, precision, reader, value, site):
    """An operation reads another value, in both functions."""
    pytest.importorskip("coremltools")
    from rgexport.artifacts.coreml.package import PACKAGE
    from tests.export.mil.package_edits import block, edit, in_both, name_of

    def change(model, function):
        operations = block(model, function).operations
        operation = next(one for one in operations if name_of(one) == reader)
        operation.inputs["x" if reader == "logits" else "data"].arguments[0].name = value

    artifact = copy(f"coreml-{precision}")
    edit(in_both(change))(artifact / PACKAGE)
    claim(artifact)
    require_named(result := judge(artifact), site)
    assert result.structure.status == "differs" and "decode: " in result.structure.reason
