"""The project's own torch reference: the step model with real weights, one layer at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rgexport.griffin import ops
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, layer_tensors
from rgexport.griffin.state import POSITION, State, layer_states, zero_state
from rgexport.griffin.step import Layer, RMSNorm
from rgexport.griffin.tensor import RowTensor, WeightSource


class Reference:
    """A model in float32 that holds the weights of one layer at a time.

    All tokens of a teacher-forced text go through one layer before the next one is read, so a
    9B runs in the memory of one of its layers, and each weight is read once per text.
    """

    def __init__(self, config: GriffinConfig, weights: WeightSource, *, device: str = "cpu"):
        """`device` is anything that torch knows; on CUDA, TF32 is turned off for the process."""
        self.config = config
        self._weights = weights
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    @torch.inference_mode()
    def run(self, tokens: np.ndarray, state: State | None = None) -> tuple[Tensor, State]:
        """One pass over tokens [B, T], from the beginning or from a canonical state.

        Returns:
            The final norm's output [B, T, width] float32, and the canonical state after it.
        """
        state = zero_state(self.config, len(tokens)) if state is None else state
        return self.run_each([(tokens, state)])[0]

    @torch.inference_mode()
    def run_each(self, texts: Sequence[tuple[np.ndarray, State]]) -> list[tuple[Tensor, State]]:
        """As `run`, for several tokens of unequal length and their states: through one layer each.

        Every weight is read once.
        """
        hidden = [self._embed(tokens) for tokens, _ in texts]
        states: list[State] = [{} for _ in texts]
        for index in range(self.config.num_layers):
            layer = self._layer(index)
            names = [spec.name for spec in layer_states(self.config, index, "float32")]
            for place, (tokens, state) in enumerate(texts):
                start = self._tensor(state[POSITION])
                positions = start.unsqueeze(1) + torch.arange(tokens.shape[1], device=self._device)
                first, second = (self._tensor(state[name]).float() for name in names)
                hidden[place], after = layer(hidden[place], positions, (first, second))
                states[place] |= {n: t.cpu().numpy() for n, t in zip(names, after, strict=True)}
        for (tokens, state), found in zip(texts, states, strict=True):
            found[POSITION] = state[POSITION] + tokens.shape[1]
        norm = self._final_norm()
        return [(norm(x), state) for x, state in zip(hidden, states, strict=True)]

    def describe(self) -> dict[str, str]:
        """On what and how it computes: `device`, `dtype`, `tf32`, `torch`."""
        cuda = self._device.type == "cuda"
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        return {
            "device": torch.cuda.get_device_name(self._device) if cuda else str(self._device),
            "dtype": "float32",
            "tf32": "on" if cuda and tf32 else "off",
            "torch": torch.__version__,
        }

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> np.ndarray:
        """Soft-capped logits [B, t, V] float32 of rows of `run`'s output [B, t, width]."""
        table = self._weights[EMBEDDING]
        logits = torch.empty((*hidden.shape[:2], table.shape[0]))
        for start, rows in table.slabs():
            part = ops.linear(hidden, self._tensor(rows.astype(np.float32)), None, "lm_head")
            part = ops.soft_cap(part, self.config.soft_cap, "logits")
            logits[..., start : start + len(rows)] = part.cpu()
        return logits.numpy()

    def _embed(self, tokens: np.ndarray) -> Tensor:
        table = self._weights[EMBEDDING]
        ids, inverse = np.unique(tokens, return_inverse=True)
        rows = np.concatenate([table.read(i, i + 1) for i in ids.tolist()]).astype(np.float32)
        places = self._tensor(inverse.reshape(tokens.shape))
        return ops.embedding(places, self._tensor(rows), self.config.embedding_scale, EMBEDDING)

    def _layer(self, index: int) -> Layer:
        with torch.device("meta"):
            layer = Layer(self.config, index)
        prefix = f"layers.{index}."
        names = layer_tensors(self.config, index)
        loaded = {name.removeprefix(prefix): self._load(self._weights[name]) for name in names}
        layer.load_state_dict(loaded, assign=True)
        return layer

    def _final_norm(self) -> RMSNorm:
        norm = RMSNorm("final_norm", self.config)
        norm.load_state_dict(
            {"weight": self._load(self._weights["final_norm.weight"])}, assign=True
        )
        return norm

    def _load(self, weight: RowTensor) -> Tensor:
        """A whole weight in float32, filled slab by slab."""
        array = np.empty(weight.shape, np.float32)
        for start, rows in weight.slabs():
            array[start : start + len(rows)] = rows
        return self._tensor(array)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)
