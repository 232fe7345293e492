"""Faults planted in GGUF files: each fails, and its layer and site are named.

Their graph is llama.cpp's, so only the file's metadata can make it wrong.
"""

import pytest

from tests.llama_tools import needs_llama_cpp
from tests.validate.faults.conftest import CONFIG, Copy, Judge, failed, require_named
from tests.validate.faults.gguf_edits import Edit, scaled, with_number, with_transposed_block

pytestmark = needs_llama_cpp

ATTENTION = "layers.2.temporal_block.attention"
METADATA: dict[str, tuple[Edit, str]] = {
    "soft cap dropped": (with_number("final_logit_softcapping", 0.0), "logits"),
    "window one less": (with_number("attention.sliding_window", CONFIG.window), ATTENTION),
    "window one more": (with_number("attention.sliding_window", CONFIG.window + 2), ATTENTION),
    "embedding scale not rounded": (
        with_number("embedding_scale", CONFIG.width**0.5),
        "embed_tokens",
    ),
    "RoPE on all dims": (
        with_number("rope.dimension_count", CONFIG.head_dim),
        "layers.2.temporal_block.rope_q",
    ),
}
"""What the file says, and the site that is to be named; llama.cpp's window counts the token too."""
DATA: dict[str, tuple[Edit, str, str]] = {
    "a weight times 1.02": (
        scaled("blk.1.ffn_up.weight", 1.02),
        "layers.1.mlp_block.up_proj",
        "layers.1.mlp_block.up_proj.weight",
    ),
    "the embedding times 1.02": (
        scaled("token_embd.weight", 1.02),
        "embed_tokens",
        "embed_tokens.weight",
    ),
    "a transposed block": (
        with_transposed_block("blk.3.rg_lru_a_gate.weight"),
        "layers.3.temporal_block.rg_lru.recurrent_gate",
        "layers.3.temporal_block.rg_lru.recurrent_gate_weight",
    ),
}
"""What is done to a tensor, the site that uses it, and its name."""


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("fault", METADATA)
def test_wrong_metadata(copy: Copy, judge: Judge, fault: str, precision: str) -> None:
    edit, site = METADATA[fault]
    artifact = copy(f"gguf-{precision}")
    edit(artifact)
    result = judge(artifact)
    require_named(result, site)
    assert result.sites is not None and result.sites.first is not None
    assert result.sites.first.site == site


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("fault", DATA)
def test_wrong_data(copy: Copy, judge: Judge, fault: str, precision: str) -> None:
    """The dequantized reference has the same weights: only the weight table shows the fault."""
    edit, site, tensor = DATA[fault]
    artifact = copy(f"gguf-{precision}")
    edit(artifact)
    result = judge(artifact)
    require_named(result, site)
    assert any(name.startswith(f"weights.{tensor}.") for name in failed(result))
    assert result.sites is not None and result.sites.first is None
