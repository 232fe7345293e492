"""Hugging Face's `RecurrentGemmaForCausalLM` as a reference.

Its window counts the token itself, so a token sees one key less than in DeepMind's code. Therefore
`HuggingFaceModel.config` has a window that is one less than the checkpoint's. The recurrent states
are attributes of its modules, which are set here before each call. They are not public: this is
written against transformers 5.24.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.huggingface_config import to_hugging_face
from rgexport.griffin.layout import model_tensors
from rgexport.griffin.state import POSITION, State
from rgexport.griffin.tensor import WeightSource
from rgexport.validate.reference.whole_model import (
    WholeModel,
    check_supported,
    in_float32,
)

VERSIONS = (5, 24), (6, 0)
"""Of transformers: the first supported one, and the first that is not."""


class HuggingFaceModel(WholeModel):
    """`transformers.RecurrentGemmaForCausalLM` in float32, with eager attention."""

    def __init__(self, config: GriffinConfig, weights: WeightSource, *, device: str = "cpu"):
        """Loads all weights.

        Raises:
            RequestError: a model that the class cannot run.
        """
        self._model = _load(config, weights, device)
        seen = dataclasses.replace(config, window=config.window - 1)
        name = f"transformers {transformers.__version__}"
        super().__init__(seen, device, name)

    def _pass(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        start = int(state[POSITION][0])
        stop = start + tokens.shape[1]
        cache = self._set(state, min(start, self.config.window))
        found = self._model.model(
            input_ids=tokens,
            position_ids=torch.arange(start, stop, device=tokens.device)[None],
            cache=cache,
            use_cache=True,
        )
        return found.last_hidden_state, self._canonical(stop, self._states(cache))

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._model.lm_head(hidden)
        cap = self.config.soft_cap
        return torch.tanh(logits / cap) * cap

    def _set(self, state: State, filled: int) -> DynamicCache:
        """Sets the recurrent states of the modules; returns a cache of the last `filled` keys."""
        cache = DynamicCache(config=self._model.config)
        for index, kind, first, second in self._layer_states(state):
            block: Any = self._model.model.layers[index].temporal_block
            if kind == "recurrent":
                block.rg_lru.recurrent_states = first
                block.conv1d_state = second.transpose(1, 2)
            elif filled:
                cache.update(first[:, None, -filled:], second[:, None, -filled:], index)
        return cache

    def _states(self, cache: DynamicCache) -> Iterator[tuple[Tensor, Tensor]]:
        for index, kind in enumerate(self.config.block_types):
            block: Any = self._model.model.layers[index].temporal_block
            if kind == "recurrent":
                yield block.rg_lru.recurrent_states, block.conv1d_state.transpose(1, 2)
            else:
                kept = cache.layers[index]
                yield self._window(kept.keys[:, 0]), self._window(kept.values[:, 0])

    def _window(self, kept: Tensor) -> Tensor:
        """Keys or values [1, n, D], zero-padded at the front to the window."""
        return nn.functional.pad(kept, (0, 0, self.config.window - kept.shape[1], 0))


def _load(config: GriffinConfig, weights: WeightSource, device: str) -> RecurrentGemmaForCausalLM:
    _check_version()
    _check_supported(config)
    theirs = RecurrentGemmaConfig(**to_hugging_face(config, "block_types"))
    state = {f"model.{name}": in_float32(weights[name], device) for name in model_tensors(config)}
    transformers.logging.disable_progress_bar()
    model, report = RecurrentGemmaForCausalLM.from_pretrained(
        None,
        config=theirs,
        state_dict=state,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if odd := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise RequestError(
            f"transformers {transformers.__version__} has other weights than 5.24: {odd[0]}; "
            "pip install 'transformers>=5.24,<6'"
        )
    return model.to(device).eval()


def _check_version() -> None:
    found = transformers.__version__
    first, last = VERSIONS
    if not first <= tuple(int(part) for part in found.split(".")[:2]) < last:
        raise RequestError(
            f"--impl hf is written against transformers 5.24, found {found}: "
            "pip install 'transformers>=5.24,<6'"
        )


def _check_supported(config: GriffinConfig) -> None:
    scale = sqrt_embedding_scale(config.width)
    rules = {
        "head_dim": (config.head_dim == config.width // config.num_heads, "width / num_heads"),
        "soft_cap": (config.soft_cap > 0, "more than 0"),
        "embedding_scale": (config.embedding_scale == scale, scale),
        "window": (config.window > 1, "more than 1"),
    }
    check_supported("Hugging Face's class", "hf", config, rules)
