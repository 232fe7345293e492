"""One step of DeepMind's implementation from a canonical state."""

import numpy as np
import torch
from recurrentgemma.torch import Griffin, modules

from rgexport.griffin.state import State


@torch.no_grad()
def deepmind_step(
    model: Griffin, state: State, tokens: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Logits [B, vocab] of tokens [B], at any position."""
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
