"""Random checkpoints of random odd shapes, sound but not all kind to quantizers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rgexport.griffin.config import GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.huggingface import CONFIG, write_weights
from rgexport.griffin.huggingface_config import to_hugging_face
from rgexport.griffin.layer_ops import Role
from rgexport.griffin.layout import TensorSpec, model_tensors
from rgexport.griffin.synthetic import random_weights
from rgexport.griffin.tensor import DTYPES, from_array

Change = Callable[[np.random.Generator, np.ndarray], np.ndarray]
"""Makes other values of a tensor's, in place or not."""


def draw_config(rng: np.random.Generator) -> GriffinConfig:
    """A shape of two to five layers; one in three has rows that K-quants fit.

    No row has 32 values: ggml's product for AMX is wrong where a row is a single block.
    """
    heads, head_dim = int(rng.integers(1, 7)), int(rng.choice([12, 24, 40, 48, 64]))
    regular = rng.random() < 1 / 3
    width = 256 if regular else max(48, heads * head_dim)
    lru_width = 256 if regular else heads * int(rng.integers(9, 17)) * 4
    return GriffinConfig(
        vocab_size=int(rng.integers(64, 700)),
        width=width,
        mlp_width=512 if regular else int(rng.integers(12, 110)) * 4,
        lru_width=lru_width,
        lru_heads=(heads := 4 if regular else heads),
        num_heads=heads,
        head_dim=head_dim,
        block_types=tuple(
            "recurrent" if recurrent else "attention"
            for recurrent in rng.random(int(rng.integers(2, 6))) < 2 / 3
        ),
        window=int(rng.integers(8, 49)),
        rope_dims=head_dim // 2,
        soft_cap=float(rng.choice([0.0, 5.0, 30.0, 30.0])),
        embedding_scale=sqrt_embedding_scale(width) if rng.random() < 3 / 4 else 1.0,
    )


def write_checkpoint(seed: int, folder: Path) -> str:
    """Writes the checkpoint of a seed in Hugging Face's layout, without a tokenizer.

    Returns:
        Its character, a key of `CHARACTERS`; neighbouring seeds have others.
    """
    rng = np.random.default_rng([seed, 5])
    config, character = draw_config(rng), list(CHARACTERS)[seed % len(CHARACTERS)]
    dtype = DTYPES[str(rng.choice(["bfloat16", "float32"]))]
    changes, tensors = CHARACTERS[character], model_tensors(config)
    weights = {
        name: from_array(_changed(changes, rng, tensors[name], tensor.whole()).astype(dtype))
        for name, tensor in random_weights(config, seed=seed, dtype="float32").items()
    }
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(to_hugging_face(config, "block_types")))
    write_weights(folder, weights)
    return character


def _changed(
    changes: Mapping[Role, Change], rng: np.random.Generator, spec: TensorSpec, values: np.ndarray
) -> np.ndarray:
    change = changes.get(spec.role)
    return change(rng, values) if change else values


def _normal(std: float) -> Change:
    return lambda rng, values: std * rng.standard_normal(values.shape, np.float32)


def _times(gain: float) -> Change:
    return lambda rng, values: gain * values


def _heavy_tails(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Student's t with four degrees of freedom, of the same variance."""
    return np.asarray(values.std() * rng.standard_t(4, values.shape) / np.sqrt(2))


def _loud_columns(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Some input channels are twenty times as large as the rest; the variance stays."""
    std = values.std()
    values[..., _some(rng, values.shape[-1])] *= 20
    return np.asarray(values * (std / values.std()))


def _loud_channels(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Some channels leave a norm, which multiplies by 1 + w, ten times as large as the rest."""
    gains = 1 + values
    gains[_some(rng, len(values))] *= 10
    return np.asarray(gains / np.sqrt(np.mean(gains**2)) - 1)


def _some(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.choice(count, max(1, count // 64), replace=False)


def _slow(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """1 - a from 1e-5 to 1e-3 with an open gate; see `synthetic` for the formula."""
    decay = np.exp(rng.uniform(np.log(1e-5), np.log(1e-3), values.shape))
    return np.asarray(np.log(np.expm1(-np.log1p(-decay) / 8)))


CHARACTERS: dict[str, Mapping[Role, Change]] = {
    "as trained": {},
    "lively": {"linear": _times(1.5), "bias": _normal(0.1), "norm": _normal(0.3)},
    "heavy tails": {"linear": _heavy_tails, "embedding": _heavy_tails},
    "large biases": {"bias": _normal(1.0)},
    "slow decays": {"a_param": _slow},
    "loud columns": {"linear": _loud_columns},
    "loud channels": {"norm": _loud_channels},
    "dull": {"embedding": _times(0.05), "linear": _times(0.3)},
}
"""What a checkpoint is like → what that changes of `random_weights`, by the tensor's role."""
