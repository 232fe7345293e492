"""The reference in torch: the step model with real weights, one layer at a time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgexport import __version__
from rgexport.griffin import ops
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, layer_tensors
from rgexport.griffin.state import POSITION, State, layer_states, zero_state
from rgexport.griffin.step import Layer, RMSNorm
from rgexport.griffin.tensor import RowTensor, WeightSource

_PIECE = 2048
"""Tokens that go through a layer at once, which bounds the memory of its activations."""

_HEAD_BYTES = 16 << 20
"""Bytes of the stored embedding that are read at once for the head."""

Watch = Callable[[int, int, Tensor], None]
"""Takes the index of a layer, that of a text, and the residual stream [B, T, width] float32 after
the layer."""


@dataclass(frozen=True)
class _Piece:
    """Tokens from `start` up to `stop`; `kept` if the state after them is wanted."""

    start: int
    stop: int
    kept: bool


class Reference:
    """A model in float32 that holds the weights of one layer at a time.

    All tokens of a teacher-forced text go through one layer before the next one is read, so a
    9B runs in the memory of one of its layers, and each weight is read once per text.
    """

    def __init__(
        self,
        config: GriffinConfig,
        weights: WeightSource,
        *,
        device: str = "cpu",
        keep: bool = False,
    ):
        """`device` is anything that torch knows; on CUDA, TF32 is turned off for the process.

        With `keep`, all weights stay in memory in float32 once they are read.
        """
        self.config = config
        self._weights = weights
        self._keep = keep
        self._layers: dict[int, Layer] = {}
        self._head: list[tuple[int, Tensor]] = []
        self.device = torch.device(device)
        turn_off_tf32(self.device)

    @torch.inference_mode()
    def run(self, tokens: np.ndarray, state: State | None = None) -> tuple[Tensor, State]:
        """One pass over tokens [B, T], from the beginning or from a canonical state.

        Returns:
            The final norm's output [B, T, width] float32, and the canonical state after it.
        """
        state = zero_state(self.config, len(tokens)) if state is None else state
        hidden, states = self.run_each([(tokens, state)])[0]
        return hidden, states[-1]

    @torch.inference_mode()
    def run_each(
        self,
        texts: Sequence[tuple[np.ndarray, State]],
        *,
        stops: Sequence[Sequence[int]] = (),
        watch: Watch | None = None,
    ) -> list[tuple[Tensor, list[State]]]:
        """As `run`, for several texts, which may differ in length; every weight is read once.

        A text goes through a layer in pieces, so that the memory for activations does not grow
        with its length.

        Args:
            texts: tokens [B, T] and the canonical state before them.
            stops: for each text, numbers of tokens, ascending and below T, after which the state
                is wanted too.
            watch: called with the residual stream after each layer.

        Returns:
            For each text, the final norm's output, and the states after the stops and the end.
        """
        pieces = [
            _pieces(tokens.shape[1], stops[place] if stops else ())
            for place, (tokens, _) in enumerate(texts)
        ]
        hidden = [self.embed(tokens) for tokens, _ in texts]
        states: list[list[State]] = [[{} for p in cut if p.kept] for cut in pieces]
        for index in range(self.config.num_layers):
            layer = self.layer(index)
            for place, (_, state) in enumerate(texts):
                self._through(layer, index, state, hidden[place], pieces[place], states[place])
                if watch is not None:
                    watch(index, place, hidden[place])
        for (_, state), cut, found in zip(texts, pieces, states, strict=True):
            for piece, after in zip((p for p in cut if p.kept), found, strict=True):
                after[POSITION] = state[POSITION] + piece.stop
        norm = self.final_norm()
        return [(norm(x), found) for x, found in zip(hidden, states, strict=True)]

    def _through(
        self,
        layer: Layer,
        index: int,
        before: State,
        hidden: Tensor,
        pieces: Sequence["_Piece"],
        found: list[State],
    ) -> None:
        """Takes one text through one layer; `hidden` [B, T, width] is changed in place."""
        names = [spec.name for spec in layer_states(self.config, index, "float32")]
        start = self._tensor(before[POSITION]).unsqueeze(1)
        first, second = (self._tensor(before[name]).float() for name in names)
        kept = iter(found)
        for piece in pieces:
            positions = start + torch.arange(piece.start, piece.stop, device=self.device)
            part = hidden[:, piece.start : piece.stop]
            part[:], (first, second) = layer(part, positions, (first, second))
            if piece.kept:
                after = (first, second)
                next(kept).update({n: t.cpu().numpy() for n, t in zip(names, after, strict=True)})

    def describe(self) -> dict[str, str]:
        """`implementation`, and what `describe_device` says."""
        return {"implementation": f"rgexport {__version__}", **describe_device(self.device)}

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> np.ndarray:
        """Soft-capped logits [B, t, V] float32 of rows of `run`'s output [B, t, width]."""
        logits = torch.empty((*hidden.shape[:2], self.config.vocab_size))
        for start, rows in self.head_slabs():
            part = ops.linear(hidden, rows, None, "lm_head")
            part = ops.soft_cap(part, self.config.soft_cap, "logits")
            logits[..., start : start + len(rows)] = part.cpu()
        return logits.numpy()

    def embed(self, tokens: np.ndarray) -> Tensor:
        """The residual stream [B, T, width] before the first layer, of tokens [B, T]."""
        table = self._weights[EMBEDDING]
        ids, inverse = np.unique(tokens, return_inverse=True)
        rows = np.concatenate([table.read(i, i + 1) for i in ids.tolist()]).astype(np.float32)
        places = self._tensor(inverse.reshape(tokens.shape))
        return ops.embedding(
            places, self._tensor(rows), self.config.embedding_scale, "embed_tokens"
        )

    def head_slabs(self) -> Iterable[tuple[int, Tensor]]:
        """The embedding in float32, slab by slab, each with its first row's number."""
        if self._head:
            return self._head
        slabs = self._weights[EMBEDDING].slabs(_HEAD_BYTES)
        rows = ((start, self._tensor(slab.astype(np.float32))) for start, slab in slabs)
        if not self._keep:
            return rows
        self._head = list(rows)
        return self._head

    def layer(self, index: int) -> Layer:
        """One layer with its weights, which are read anew unless they are kept."""
        if index in self._layers:
            return self._layers[index]
        layer = self._read_layer(index)
        if self._keep:
            self._layers[index] = layer
        return layer

    def _read_layer(self, index: int) -> Layer:
        with torch.device("meta"):
            layer = Layer(self.config, index)
        prefix = f"layers.{index}."
        names = layer_tensors(self.config, index)
        loaded = {name.removeprefix(prefix): self._load(self._weights[name]) for name in names}
        layer.load_state_dict(loaded, assign=True)
        return layer

    def final_norm(self) -> RMSNorm:
        """The norm before the head."""
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
        return torch.from_numpy(array).to(self.device)


def turn_off_tf32(device: torch.device) -> None:
    """Makes CUDA compute float32 exactly, from now on in this process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def describe_device(device: torch.device) -> dict[str, str]:
    """What torch computes on: `device`, `dtype`, `tf32`, `torch`."""
    cuda = device.type == "cuda"
    tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return {
        "device": torch.cuda.get_device_name(device) if cuda else str(device),
        "dtype": "float32",
        "tf32": "on" if cuda and tf32 else "off",
        "torch": torch.__version__,
    }


def _pieces(count: int, stops: Sequence[int]) -> list[_Piece]:
    """Cuts `count` tokens at the stops, and after every `_PIECE` tokens between them."""
    return [
        _Piece(first, min(first + _PIECE, stop), first + _PIECE >= stop)
        for start, stop in zip([0, *stops], [*stops, count], strict=True)
        for first in range(start, stop, _PIECE)
    ]
