"""The small models that seeds are made of."""

import json
from pathlib import Path

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.huggingface import write_weights
from rgexport.griffin.huggingface_config import to_hugging_face
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.tensor import DTYPES, from_array
from rgexport.quantize.schemes.registry import Affine, Mixed, RowGroup

CONFIG = GriffinConfig(
    vocab_size=16,
    width=8,
    mlp_width=16,
    lru_width=8,
    lru_heads=2,
    num_heads=2,
    head_dim=4,
    block_types=("recurrent", "attention"),
    window=8,
    rope_dims=2,
)
"""As small as a model of both kinds of layers can be."""
ROW_GROUPS = Mixed(
    (
        RowGroup("0-2,7", Affine(8, 32, symmetric=True)),
        RowGroup("4", Affine(4, 32, symmetric=False)),
        RowGroup(None, Affine(4, 32, symmetric=True)),
    )
)
"""A way to store its embedding."""


def weights(config: GriffinConfig = CONFIG) -> dict[str, np.ndarray]:
    """Canonical name → some values, float32."""
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(0, 0.3, spec.shape).astype(np.float32)
        for name, spec in model_tensors(config).items()
    }


def write_model(
    folder: Path, config: GriffinConfig = CONFIG, dtype: str = "float32", shards: bool = False
) -> Path:
    """A checkpoint in Hugging Face's layout, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hugging_face(config, "block_types")))
    stored = {
        name: from_array(array.astype(DTYPES[dtype])) for name, array in weights(config).items()
    }
    write_weights(folder, stored, shard_bytes=2000 if shards else 1 << 30)
    return folder
