"""Where the sites are in the graph that llama.cpp builds for RecurrentGemma.

Names come from `cb` in kernels/llama_cpp/recurrentgemma.cpp and, for projections and attention,
in llama.cpp's own src/llama-graph.cpp (commit 0c1e570).
"""

from dataclasses import dataclass

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.sites import sites


@dataclass(frozen=True)
class Tap:
    """A tensor of the graph.

    Attributes:
        name: the first tensor of that name; those of a layer have its index behind it.
        then: if given, it is the first result of this operation behind that tensor instead.
    """

    name: str
    then: str = ""


_ONCE = {
    "embed_tokens": Tap("embd"),
    "final_norm": Tap("result_norm"),
    "lm_head": Tap("result_norm", "MUL_MAT"),
    "logits": Tap("result_output"),
}
_IN_LAYER = {
    "temporal_pre_norm": Tap("attn_norm"),
    "temporal_block.linear_y": Tap("linear_y"),
    "temporal_block.linear_x": Tap("linear_x"),
    "temporal_block.conv_1d": Tap("conv_output"),
    "temporal_block.rg_lru.input_gate": Tap("rg_lru_input_gate"),
    "temporal_block.rg_lru.recurrent_gate": Tap("rg_lru_a_gate"),
    "temporal_block.rg_lru": Tap("rg_lru"),
    "temporal_block.mul": Tap("recurrent_gated"),
    "temporal_block.linear_out": Tap("linear_out"),
    "temporal_block.q_proj": Tap("Qcur"),
    "temporal_block.rope_q": Tap("Qcur", "ROPE"),
    "temporal_block.k_proj": Tap("Kcur"),
    "temporal_block.rope_k": Tap("Kcur", "ROPE"),
    "temporal_block.v_proj": Tap("Vcur"),
    "temporal_block.attention": Tap("kqv_out"),
    "temporal_block.o_proj": Tap("kqv_out", "ADD"),
    "temporal_residual": Tap("residual"),
    "channel_pre_norm": Tap("ffn_norm"),
    "mlp_block.gate_proj": Tap("ffn_gate"),
    "mlp_block.up_proj": Tap("ffn_up"),
    "mlp_block.mul": Tap("ffn_geglu"),
    "mlp_block.down_proj": Tap("ffn_out"),
    "channel_residual": Tap("l_out"),
}
"""Site within a layer → tensor. A GELU is computed together with its product."""


def taps(config: GriffinConfig) -> dict[str, Tap]:
    """Site → tensor, of all sites that the graph of `config` has."""
    found = {}
    for site in sites(config):
        tap = _in_layer(site) if site.startswith("layers.") else _ONCE.get(site)
        if tap is not None:
            found[site] = tap
    return found


def _in_layer(site: str) -> Tap | None:
    _, index, name = site.split(".", 2)
    tap = _IN_LAYER.get(name)
    return None if tap is None else Tap(f"{tap.name}-{index}", tap.then)
