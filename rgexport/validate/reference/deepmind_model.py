"""DeepMind's own implementation as a reference: the torch part of the `recurrentgemma` package."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
import torch
from recurrentgemma import common
from recurrentgemma.torch import Griffin
from recurrentgemma.torch.modules import AttentionBlockCache, RecurrentBlockCache
from torch import Tensor, nn

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig, sqrt_embedding_scale
from rgexport.griffin.deepmind import BRANCHES, CONV, GLOBAL_NAMES, NAMES, UP, UP_BIAS
from rgexport.griffin.layer_by_layer import Watch
from rgexport.griffin.reference import describe_device, turn_off_tf32
from rgexport.griffin.state import POSITION, State, layer_states, zero_state
from rgexport.griffin.tensor import WeightSource

Cache = dict[str, RecurrentBlockCache | AttentionBlockCache]


class DeepMindModel:
    """`recurrentgemma.torch.Griffin` in float32, whole in memory, as a reference.

    It takes many tokens at once only from the beginning of a text, and one at a time from a state.
    """

    def __init__(self, config: GriffinConfig, weights: WeightSource, *, device: str = "cpu"):
        self.config, self._device = config, torch.device(device)
        self._model = _load(config, weights, device)
        self._stream = torch.empty(0)
        self._model.blocks[-1].register_forward_hook(self._keep)
        turn_off_tf32(self._device)

    def describe(self) -> dict[str, str]:
        name = f"recurrentgemma {version('recurrentgemma')}"
        return {"implementation": name, **describe_device(self._device)}

    @torch.inference_mode()
    def run(self, tokens: np.ndarray, state: State | None = None) -> tuple[Tensor, State]:
        """Takes tokens [B, T], one row after another; see `griffin.reference.Reference.run`."""
        state = zero_state(self.config, len(tokens)) if state is None else state
        rows = [
            self._row(tokens[i : i + 1], {name: array[i : i + 1] for name, array in state.items()})
            for i in range(len(tokens))
        ]
        after = {name: np.concatenate([row[name] for _, row in rows]) for name in state}
        return torch.cat([hidden for hidden, _ in rows]), after

    @torch.inference_mode()
    def run_each(
        self,
        texts: Sequence[tuple[np.ndarray, State]],
        *,
        stops: Sequence[Sequence[int]] = (),
        watch: Watch | None = None,
    ) -> list[tuple[Tensor, list[State]]]:
        """Takes one text of batch 1 after another; calls `watch` when a text is done."""
        passes = []
        for index, (tokens, state) in enumerate(texts):
            inside = stops[index] if stops else ()
            states = [self._row(tokens[:, :stop], state)[1] for stop in inside]
            hidden, after = self._row(tokens, state)
            if watch is not None:
                for layer in range(self.config.num_layers):
                    watch(layer, index, hidden)
            passes.append((hidden, [*states, after]))
        return passes

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> np.ndarray:
        """Returns soft-capped logits [B, t, V] float32 of rows of hidden states [B, t, width]."""
        logits, cap = self._model.embedder.decode(hidden), self.config.soft_cap
        return _to_numpy(nn.functional.tanh(logits / cap) * cap if cap else logits)

    def _row(self, tokens: np.ndarray, state: State) -> tuple[Tensor, State]:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        if not state[POSITION].any():
            return self._pass(ids, state)
        hidden = []
        for token in ids.unbind(1):
            after, state = self._pass(token[None], state)
            hidden.append(after)
        return torch.cat(hidden, 1), state

    def _pass(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Takes tokens [1, T] from the beginning, or one token from a state of batch 1."""
        start = int(state[POSITION][0])
        stop = start + tokens.shape[1]
        positions = torch.arange(start, stop, device=tokens.device)[None]
        # The package's logits would be those of all tokens at once.
        _, cache = self._model(
            tokens, positions, self._to_cache(state) if start else None, return_logits=False
        )
        return self._model.final_norm(self._stream), self._to_state(cache, stop)

    def _keep(self, block: nn.Module, inputs: object, output: tuple[Tensor, object]) -> None:
        self._stream = output[0]

    def _to_cache(self, state: State) -> Cache:
        """Copies a state, since the package writes into its caches; keys lie modulo window."""
        count = state[POSITION].astype(np.int32)
        turn = int(count[0]) % self.config.window
        cache: Cache = {}
        for index, kind in enumerate(self.config.block_types):
            first, second = (
                torch.from_numpy(state[spec.name].astype(np.float32)).to(self._device)
                for spec in layer_states(self.config, index, "float32")
            )
            if kind == "attention":
                keys, values = (array.roll(turn, 1)[:, :, None] for array in (first, second))
                position = torch.from_numpy(count.copy()).to(first.device)
                cache[f"blocks.{index}"] = AttentionBlockCache(keys, values, position)
            else:
                cache[f"blocks.{index}"] = RecurrentBlockCache(first, second)
        return cache

    def _to_state(self, cache: Cache, count: int) -> State:
        turn, state = -(count % self.config.window), {POSITION: np.array([count], np.int64)}
        for index in range(self.config.num_layers):
            block, specs = cache[f"blocks.{index}"], layer_states(self.config, index, "float32")
            for spec, array in zip(specs, block, strict=False):
                if isinstance(block, AttentionBlockCache):
                    array = array[:, :, 0].roll(turn, 1)
                state[spec.name] = _to_numpy(array)
        return state


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
    state = {name: _load_tensor(name, weights, device) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check_supported(config: GriffinConfig) -> None:
    """Refuses what the package lacks: it has one number of heads, and constants for fields."""
    scale = sqrt_embedding_scale(config.width)
    supported = {
        "lru_heads": config.num_heads,
        "head_dim": config.width // config.num_heads,
        "rope_dims": config.head_dim // 2,
        "rope_theta": 10_000.0,
        "rms_eps": 1e-6,
        "conv_width": 4,
        "embedding_scale": 1.0 if config.embedding_scale == 1.0 else scale,
    }
    for name, value in supported.items():
        if getattr(config, name) != value:
            raise RequestError(
                f"DeepMind's package cannot run this model: its {name} is "
                f"{getattr(config, name)}, expected {value}; leave out --impl deepmind"
            )


def _load_tensor(name: str, weights: WeightSource, device: str) -> Tensor:
    def load(canonical: str) -> Tensor:
        return torch.from_numpy(weights[canonical].whole().astype(np.float32)).to(device)

    if name in GLOBAL_NAMES:
        return load(GLOBAL_NAMES[name])
    _, index, local = name.split(".", 2)  # blocks.3.recurrent_block.linear_x.weight
    prefix = f"layers.{index}."
    if local in (UP, UP_BIAS):
        kind = "weight" if local == UP else "bias"
        both = torch.stack([load(f"{prefix}{branch}.{kind}") for branch in BRANCHES])
        return both.mT.contiguous() if local == UP else both[:, None, None]
    tensor = load(prefix + NAMES[local])
    return tensor[:, 0].T.contiguous() if local == CONV else tensor


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()
