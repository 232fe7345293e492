"""The canonical state of a conversation, which every engine can give and take.

| name | shape | dtype |
|---|---|---|
| `layers.{i}.rg_lru` | [B, lru_width] | float32, always |
| `layers.{i}.conv1d` | [B, conv_width - 1, lru_width] | activation dtype, oldest first |
| `layers.{i}.key`, `.value` | [B, window, head_dim] | activation dtype, oldest first after zeros |
| `position` | [B] | int64, tokens seen so far |
"""

from dataclasses import dataclass

import numpy as np

from rgexport.griffin.config import GriffinConfig

State = dict[str, np.ndarray]

POSITION = "position"


@dataclass(frozen=True)
class StateSpec:
    """A state tensor: `shape` is without the batch axis, `dtype` a numpy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def layer_states(config: GriffinConfig, index: int, activation: str) -> tuple[StateSpec, StateSpec]:
    """Returns the two states of layer `index`, in the order in which the step model takes them."""
    prefix = f"layers.{index}"
    if config.block_types[index] == "recurrent":
        conv = (config.conv_width - 1, config.lru_width)
        return (
            StateSpec(f"{prefix}.rg_lru", (config.lru_width,), "float32"),
            StateSpec(f"{prefix}.conv1d", conv, activation),
        )
    cache = (config.window, config.head_dim)
    return (
        StateSpec(f"{prefix}.key", cache, activation),
        StateSpec(f"{prefix}.value", cache, activation),
    )


def state_specs(config: GriffinConfig, activation: str = "float32") -> list[StateSpec]:
    return [spec for i in range(config.num_layers) for spec in layer_states(config, i, activation)]


def zero_state(config: GriffinConfig, batch: int) -> State:
    """Returns the state before the first token, in float32."""
    state = {s.name: np.zeros((batch, *s.shape), s.dtype) for s in state_specs(config)}
    return state | {POSITION: np.zeros(batch, np.int64)}
