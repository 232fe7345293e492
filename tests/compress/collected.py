"""Statistics of small models on given sequences, and DeepMind's model on the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recurrentgemma.torch import Griffin

from rgexport.compress.calibrate import CalibrationOptions, collect
from rgexport.compress.passages import Passages
from rgexport.compress.work import open_work
from rgexport.files.atomic import COMPLETE
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.checks import require_sound
from rgexport.griffin.config import GriffinConfig
from rgexport.quantize.calibration import Calibration, open_calibration
from tests.models import ODD_CONFIGS, random_weights, write_hugging_face

LENGTHS = (26, 26, 19, 1)
"""Longer than a window, equal and unequal ones, and a single token."""


def passages(config: GriffinConfig, lengths: Sequence[int] = LENGTHS) -> Passages:
    tokens = np.random.default_rng(7).integers(0, config.vocab_size, sum(lengths))
    return Passages(tokens.astype(np.int32), np.array(lengths, np.int32))


def checkpoint_of(name: str, folder: Path) -> Checkpoint:
    config = ODD_CONFIGS[name]
    return open_checkpoint(write_hugging_face(config, random_weights(config), folder))


def collected(
    checkpoint: Checkpoint, text: Passages, folder: Path, *, gradients: int = 10**6
) -> Calibration:
    options = CalibrationOptions(gradient_tokens=gradients)
    options = options.for_model(checkpoint.config, readable=False)
    work = open_work(folder, {}, force=False)
    text, nothing = text.without_last(0)
    collect(work, checkpoint, text, nothing, options, require_sound(checkpoint), "cpu")
    return open_calibration(folder / COMPLETE)


def sequences(text: Passages) -> list[np.ndarray]:
    return np.split(text.tokens.astype(np.int64), np.cumsum(text.lengths)[:-1])


MODULES = {
    "linear_x": "recurrent_block.linear_x",
    "linear_y": "recurrent_block.linear_y",
    "linear_out": "recurrent_block.linear_out",
    "q_proj": "attention_block.proj_q",
    "k_proj": "attention_block.proj_k",
    "v_proj": "attention_block.proj_v",
    "o_proj": "attention_block.proj_final",
    "gate_proj": "mlp_block.ffw_up",
    "up_proj": "mlp_block.ffw_up",
    "down_proj": "mlp_block.ffw_down",
}
"""Linear → the module of DeepMind's model that computes it, within a block."""


def module_of(model: Griffin, tensor: str) -> torch.nn.Module:
    _, index, *_, linear, _ = tensor.split(".")
    return model.get_submodule(f"blocks.{index}.{MODULES[linear]}")


def run(model: Griffin, text: Passages, then: Callable[[int, Any], None] | None = None) -> None:
    """Each sequence from a fresh state; `then` takes its number and its logits [1, T, V]."""
    for number, ids in enumerate(sequences(text)):
        positions = torch.arange(len(ids))[None]
        logits, _ = model(torch.from_numpy(ids)[None], positions)
        if then:
            then(number, logits)
