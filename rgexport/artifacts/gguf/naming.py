"""Maps a Griffin model to a GGUF file, with llama.cpp's names for other hybrid models."""

from dataclasses import dataclass

import numpy as np

from rgexport.artifacts.transforms import DECAY, NORM, PLAIN, Shape, Transform
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_ops import Role, all_ops
from rgexport.griffin.layout import EMBEDDING, QUANTIZABLE, model_tensors

ARCHITECTURE = "recurrentgemma"


def _transposed(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks.swapaxes(1, 2))


_GATE_BIAS = Transform(shape=lambda shape: (shape[0] * shape[1],))
_TRANSFORMS: dict[Role, Transform] = {
    "norm": NORM,
    "conv": Transform(shape=lambda shape: (shape[0], shape[2])),
    "a_param": DECAY,
    "gate": Transform(_transposed, _transposed),
}
"""Role → transform; other tensors, and biases of linears, are stored unchanged."""

_GLOBAL = {EMBEDDING: "token_embd.weight", "final_norm.weight": "output_norm.weight"}
_LAYER: dict[str, str] = {
    f"{op.site}{tensor.end}": f"{op.gguf}{tensor.gguf}"
    for op in all_ops().values()
    for tensor in op.tensors
}


def architecture(c: GriffinConfig) -> dict[str, int | float | list[int]]:
    """Returns the metadata from which llama.cpp builds the graph, in the file's order."""
    pairs: dict[str, int | float | list[int]] = {
        "vocab_size": c.vocab_size,
        "context_length": 1 << 20,  # there is no limit; llama.cpp's converter has this for Mamba
        "embedding_length": c.width,
        "feed_forward_length": c.mlp_width,
        "block_count": c.num_layers,
        "attention.head_count": c.num_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.sliding_window": c.window + 1,  # llama.cpp counts the token itself
        "rope.dimension_count": c.rope_dims,
        "ssm.conv_kernel": c.conv_width,
        "ssm.inner_size": c.lru_width,
        "ssm.state_size": 1,
        "ssm.group_count": 0,
        "ssm.time_step_rank": c.lru_heads,
        "attention.layer_norm_rms_epsilon": c.rms_eps,
        "rope.freq_base": c.rope_theta,
        "final_logit_softcapping": c.soft_cap,
        "embedding_scale": c.embedding_scale,
        "attention.head_count_kv": [int(kind == "attention") for kind in c.block_types],
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in pairs.items()}


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file; shapes are in numpy's order (ggml's `ne` is the reverse)."""

    canonical: str
    name: str
    canonical_shape: Shape
    shape: Shape
    quantizable: bool
    transform: Transform


def file_tensors(config: GriffinConfig) -> list[FileTensor]:
    """Returns all tensors in llama.cpp's order: globals, then by layer and name."""
    tensors: dict[tuple[int, str], FileTensor] = {}
    for canonical, spec in model_tensors(config).items():
        is_gate_bias = spec.role == "gate" and len(spec.shape) == 2
        transform = _GATE_BIAS if is_gate_bias else _TRANSFORMS.get(spec.role, PLAIN)
        shape = transform.shape(spec.shape)
        while len(shape) > 1 and shape[0] == 1:  # ggml does not count these
            shape = shape[1:]
        # To ggml a matrix of one row is a vector, which is never quantized.
        quantizable = spec.role in QUANTIZABLE and len(shape) > 1
        layer, name = -1, _GLOBAL.get(canonical)
        if name is None:
            _, index, local = canonical.split(".", 2)
            layer, name = int(index), f"blk.{index}.{_LAYER[local]}"
        tensor = FileTensor(canonical, name, spec.shape, shape, quantizable, transform)
        tensors[layer, name] = tensor
    return [tensors[key] for key in sorted(tensors)]
