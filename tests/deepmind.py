"""DeepMind's implementation, the oracle of the tests, imported when called: it brings jax."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.deepmind import GLOBAL_NAMES, NAMES
from rgexport.griffin.state import State
from tests.models import Weights

if TYPE_CHECKING:
    from recurrentgemma.torch import Griffin


def deepmind_state_dict(weights: Weights) -> dict[str, torch.Tensor]:
    """The weights by DeepMind's names and in its orientation."""
    local = {canonical: name for name, canonical in NAMES.items()}
    whole = {canonical: name for name, canonical in GLOBAL_NAMES.items()}
    state: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if name in whole:
            state[whole[name]] = array
            continue
        _, index, rest = name.split(".", 2)
        prefix = f"blocks.{index}."
        if rest.startswith("mlp_block.up_proj"):
            continue
        if rest.startswith("mlp_block.gate_proj"):
            pair = np.stack([array, weights[name.replace("gate_proj", "up_proj")]])
            weight = pair.ndim == 3
            pair = pair.swapaxes(1, 2) if weight else pair[:, None, None]
            state[f"{prefix}mlp_block.ffw_up.{'w' if weight else 'b'}"] = pair
        elif rest == "temporal_block.conv_1d.weight":
            state[f"{prefix}recurrent_block.conv_1d.w"] = array[:, 0].T
        else:
            state[prefix + local[rest]] = array
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def write_deepmind(weights: Weights, folder: Path, *, dtype: str = "float32") -> Path:
    """Writes the model as DeepMind's `.pt`, without a tokenizer; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    state = deepmind_state_dict(weights)
    state = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def deepmind_model(config: GriffinConfig, weights: Weights) -> "Griffin":
    from recurrentgemma import common
    from recurrentgemma.torch import Griffin

    types = common.TemporalBlockType
    named_alike = "vocab_size", "width", "num_heads", "lru_width"
    theirs = common.GriffinConfig(
        mlp_expanded_width=config.mlp_width,
        block_types=tuple(types[kind.upper()] for kind in config.block_types),
        embeddings_scale_by_sqrt_dim=config.embedding_scale != 1.0,
        attention_window_size=config.window,
        logits_soft_cap=config.soft_cap,
        **{name: getattr(config, name) for name in named_alike},
    )
    model = Griffin(theirs, gradient_checkpointing=False, dtype=torch.float32)
    state = {name: value.float() for name, value in deepmind_state_dict(weights).items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def deepmind_logits(model: "Griffin", tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, vocab] of one pass over tokens [B, T]."""
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    logits, _ = model(torch.from_numpy(tokens.astype(np.int64)), positions)
    return logits.numpy()


@torch.no_grad()
def deepmind_step(
    model: "Griffin", state: State, tokens: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Logits [B, vocab] of tokens [B], at any position."""
    from recurrentgemma.torch import modules

    cache: dict[str, object] = {}
    for index in range(len(model.blocks)):
        prefix = f"layers.{index}."
        if f"{prefix}key" in state:
            keys, values = (torch.tensor(state[prefix + n])[:, :, None] for n in ("key", "value"))
            seen = torch.tensor(positions, dtype=torch.int32)
            cache[f"blocks.{index}"] = modules.AttentionBlockCache(keys, values, seen)
        else:
            cache[f"blocks.{index}"] = modules.RecurrentBlockCache(
                torch.tensor(state[f"{prefix}rg_lru"]), torch.tensor(state[f"{prefix}conv1d"])
            )
    logits, _ = model(torch.tensor(tokens)[:, None], torch.tensor(positions)[:, None], cache)
    return logits[:, 0].numpy()
