"""DeepMind's own implementation, the torch part of the `recurrentgemma` package, as a reference."""

import re
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import torch
from recurrentgemma import common
from recurrentgemma.torch import Griffin
from recurrentgemma.torch.modules import AttentionBlockCache, RecurrentBlockCache
from torch import Tensor, nn

from rgexport.griffin.config import GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.deepmind import BRANCHES, CONV, GLOBAL_NAMES, NAMES, UP, UP_BIAS
from rgexport.griffin.state import POSITION, State
from rgexport.griffin.tensor import WeightSource
from rgexport.validate.reference.whole_model import (
    WholeModel,
    check_supported,
    in_float32,
)


class DeepMindModel(WholeModel):
    """`recurrentgemma.torch.Griffin` in float32."""

    def __init__(self, config: GriffinConfig, weights: WeightSource, *, device: str = "cpu"):
        """Loads all weights.

        Raises:
            RequestError: a model that the package cannot run.
        """
        self._model = _load(config, weights, device)
        self._stream = torch.empty(0)
        self._model.blocks[-1].register_forward_hook(self._keep)
        name = f"recurrentgemma {version('recurrentgemma')}"
        super().__init__(config, device, name)

    def _pass(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        start = int(state[POSITION][0])
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        # The package's logits would be those of all tokens at once.
        _, cache = self._model(
            tokens, positions, self._cache(state) if start else None, return_logits=False
        )
        stop = start + tokens.shape[1]
        hidden = self._model.final_norm(self._stream)
        return hidden, self._canonical(stop, self._states(cache, stop))

    def _head(self, hidden: Tensor) -> Tensor:
        logits = self._model.embedder.decode(hidden)
        cap = self.config.soft_cap
        return nn.functional.tanh(logits / cap) * cap if cap else logits

    def _keep(self, block: nn.Module, inputs: object, output: tuple[Tensor, object]) -> None:
        self._stream = output[0]

    def _cache(self, state: State) -> dict[str, RecurrentBlockCache | AttentionBlockCache]:
        """The package's cache from a canonical state; keys lie at their positions modulo window.

        Everything is copied, because the package writes into its caches.
        """
        count = state[POSITION].astype(np.int32)
        turn = int(count[0]) % self.config.window
        cache: dict[str, RecurrentBlockCache | AttentionBlockCache] = {}
        for index, kind, first, second in self._layer_states(state):
            if kind == "attention":
                keys, values = (part.roll(turn, 1)[:, :, None] for part in (first, second))
                position = torch.from_numpy(count.copy()).to(first.device)
                cache[f"blocks.{index}"] = AttentionBlockCache(keys, values, position)
            else:
                cache[f"blocks.{index}"] = RecurrentBlockCache(first, second)
        return cache

    def _states(
        self, cache: dict[str, RecurrentBlockCache | AttentionBlockCache], count: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        turn = -(count % self.config.window)
        for index in range(self.config.num_layers):
            found = cache[f"blocks.{index}"]
            first, second = found[0], found[1]
            if isinstance(found, AttentionBlockCache):
                first, second = (part[:, :, 0].roll(turn, 1) for part in (first, second))
            yield first, second


def _load(config: GriffinConfig, weights: WeightSource, device: str) -> Griffin:
    _check_supported(config)
    types = common.TemporalBlockType
    theirs = common.GriffinConfig(
        vocab_size=config.vocab_size,
        width=config.width,
        mlp_expanded_width=config.mlp_width,
        num_heads=config.num_heads,
        block_types=tuple(types[kind.upper()] for kind in config.block_types),
        embeddings_scale_by_sqrt_dim=config.embedding_scale != 1.0,
        attention_window_size=config.window,
        logits_soft_cap=config.soft_cap,
        lru_width=config.lru_width,
    )
    model = Griffin(theirs, gradient_checkpointing=False, device="meta", dtype=torch.float32)
    state = {name: _tensor(name, weights, device) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check_supported(config: GriffinConfig) -> None:
    """The package has one number of heads, and constants where `config` has fields."""
    scale = sqrt_embedding_scale(config.width)
    only = {
        "lru_heads": config.num_heads,
        "head_dim": config.width // config.num_heads,
        "rope_dims": config.head_dim // 2,
        "rope_theta": 10_000.0,
        "rms_eps": 1e-6,
        "conv_width": 4,
        "embedding_scale": 1.0 if config.embedding_scale == 1.0 else scale,
    }
    rules = {name: (getattr(config, name) == value, value) for name, value in only.items()}
    check_supported("DeepMind's package", "deepmind", config, rules)


def _tensor(name: str, weights: WeightSource, device: str) -> Tensor:
    """One of DeepMind's tensors from the canonical ones; see `griffin.deepmind`."""
    if name in GLOBAL_NAMES:
        return in_float32(weights[GLOBAL_NAMES[name]], device)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"recurrentgemma has an unknown tensor {name}")
    prefix, local = f"layers.{match[1]}.", match[2]

    def read(canonical: str) -> Tensor:
        return in_float32(weights[prefix + canonical], device)

    if local in (UP, UP_BIAS):
        kind = "weight" if local == UP else "bias"
        both = torch.stack([read(f"{branch}.{kind}") for branch in BRANCHES])
        return both.mT.contiguous() if local == UP else both[:, None, None]
    found = read(NAMES[local])
    return found[:, 0].T.contiguous() if local == CONV else found
