"""Small Griffin models of odd shapes, and their weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.griffin.config import BlockType, GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.huggingface import HEAD, SHARD_BYTES, SINGLE, write_weights
from rgexport.griffin.huggingface_config import Dialect, to_hugging_face
from rgexport.griffin.layout import TensorSpec, model_tensors
from rgexport.griffin.tensor import DTYPES, WeightSource, from_array

Weights = dict[str, np.ndarray]  # canonical name → array, float32

_LETTERS: dict[str, BlockType] = {"r": "recurrent", "a": "attention"}


def make_config(
    blocks: str,
    *,
    width: int,
    heads: int,
    lru_width: int | None = None,
    mlp_width: int = 96,
    vocab_size: int = 256,
    window: int = 16,
    soft_cap: float = 30.0,
    scaled: bool = True,
    head_dim: int | None = None,
) -> GriffinConfig:
    """A configuration such as DeepMind's code allows (one number of heads, conv width 4).

    `blocks` is a word of `r` and `a`. DeepMind's code cannot run a `head_dim` of its own.
    """
    head_dim = head_dim or width // heads
    return GriffinConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        lru_width=lru_width or width,
        lru_heads=heads,
        num_heads=heads,
        head_dim=head_dim,
        block_types=tuple(_LETTERS[letter] for letter in blocks),
        window=window,
        rope_dims=head_dim // 2,
        soft_cap=soft_cap,
        embedding_scale=sqrt_embedding_scale(width) if scaled else 1.0,
    )


ODD_CONFIGS: dict[str, GriffinConfig] = {
    "regular": make_config("rrarr", width=64, heads=4),
    "wide_lru": make_config("rrar", width=64, heads=4, lru_width=96),
    "narrow_lru": make_config("rarr", width=96, heads=4, lru_width=64, window=24),
    "not_by_32": make_config(
        "rra", width=40, heads=5, lru_width=60, mlp_width=72, vocab_size=101, window=24
    ),
    "not_by_128": make_config("rar", width=160, heads=5, lru_width=320, mlp_width=416),
    "hawk": make_config("rrr", width=64, heads=2, lru_width=80, soft_cap=0.0, scaled=False),
    "attention_tail": make_config("raaa", width=64, heads=2, mlp_width=160),
    "attention_only": make_config("aa", width=32, heads=2, vocab_size=64),
    "irregular": make_config("raar", width=64, heads=8, window=24),
    "one_head": make_config("rarra", width=48, heads=1, lru_width=64, soft_cap=5.0),
}
"""Shapes that differ from RecurrentGemma's in some relation; DeepMind's code runs them all."""


def random_weights(config: GriffinConfig, seed: int = 0, slowest: float = 1e-4) -> Weights:
    """Random weights; norms, biases and decays are large enough for an error in them to show.

    With an open gate the decays are from 0.9 to 1 - `slowest`.
    """
    generator = np.random.default_rng(seed)
    tensors = model_tensors(config)
    return {name: _random(generator, name, spec, slowest) for name, spec in tensors.items()}


def _random(
    generator: np.random.Generator, name: str, spec: TensorSpec, slowest: float
) -> np.ndarray:
    normal = generator.standard_normal(spec.shape).astype(np.float32)
    match spec.role:
        case "a_param":
            # a = exp(-8 softplus(p)) near 1, where sqrt(1 - a²) is delicate
            decay = np.exp(np.linspace(np.log(slowest), np.log(0.1), spec.shape[0]))
            decay = generator.permutation(decay)
            return np.log(np.expm1(-np.log1p(-decay) / 8)).astype(np.float32)
        case "norm":
            return 0.3 * normal
        case "bias":
            return 0.1 * normal
        case "conv":
            return 0.5 * normal
        case "gate" if name.endswith("_bias"):
            return 0.5 * normal
        case "gate":
            return normal / np.float32(np.sqrt(spec.shape[1]))
        case _:
            # queries and keys of twice the size, so that attention is far from uniform
            gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            return np.float32(gain / np.sqrt(spec.shape[1])) * normal


def weight_source(weights: Weights) -> WeightSource:
    """The weights as lazy tensors."""
    return {name: from_array(array) for name, array in weights.items()}


def write_hugging_face(
    config: GriffinConfig,
    weights: Weights,
    folder: Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    dialect: Dialect = "block_types",
    head: np.ndarray | None = None,
) -> Path:
    """Writes the model in Hugging Face's layout, without a tokenizer; returns `folder`.

    `head` is saved too, in its own dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hugging_face(config, dialect)))
    stored = {name: array.astype(DTYPES[dtype]) for name, array in weights.items()}
    if head is not None:
        stored[HEAD] = head
    write_weights(folder, weight_source(stored), shard_bytes=shard_bytes)
    if head is not None:
        edit_header(folder, lambda h: h.update({HEAD: h.pop(f"model.{HEAD}")}))
    return folder


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Lets `change` edit the header of a model's safetensors file."""
    path = folder / SINGLE
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
