"""Base of references that another package computes: the whole model in memory, in float32."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layer_by_layer import Watch
from rgexport.griffin.reference import describe_device, turn_off_tf32
from rgexport.griffin.state import POSITION, State, layer_states, zero_state
from rgexport.griffin.tensor import RowTensor


class WholeModel(ABC):
    """A `reference_pass.ReferenceModel` on top of a package's own model.

    Such models take many tokens at once only from the beginning of a text, and one at a time from
    a state. So a state inside a text comes from a run of its own that ends there.
    """

    def __init__(self, config: GriffinConfig, device: str, implementation: str):
        """`config` is what the package really computes."""
        self.config = config
        self._device = torch.device(device)
        self._implementation = implementation
        turn_off_tf32(self._device)

    @abstractmethod
    def _pass(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Takes tokens [1, T] from the beginning, or one token from a state of batch 1.

        Returns the final norm's output [1, T, width] and the canonical state after it.
        """

    @abstractmethod
    def _head(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits [B, t, vocab] of [B, t, width]."""

    def describe(self) -> dict[str, str]:
        """Adds `implementation` to `describe_device`."""
        return {"implementation": self._implementation, **describe_device(self._device)}

    @torch.inference_mode()
    def run(self, tokens: np.ndarray, state: State | None = None) -> tuple[Tensor, State]:
        """Takes tokens [B, T], one row after another; see `griffin.reference.Reference.run`."""
        state = zero_state(self.config, len(tokens)) if state is None else state
        rows = [
            self._row(tokens[i : i + 1], {name: array[i : i + 1] for name, array in state.items()})
            for i in range(len(tokens))
        ]
        after = {name: np.concatenate([found[name] for _, found in rows]) for name in state}
        return torch.cat([hidden for hidden, _ in rows]), after

    @torch.inference_mode()
    def run_each(
        self,
        texts: Sequence[tuple[np.ndarray, State]],
        *,
        stops: Sequence[Sequence[int]] = (),
        watch: Watch | None = None,
    ) -> list[tuple[Tensor, list[State]]]:
        """Takes one text of batch 1 after another, each from its beginning.

        `watch` is called once for each layer when a text is done, with the last norm's output.
        """
        found = []
        for index, (tokens, state) in enumerate(texts):
            inside = stops[index] if stops else ()
            states = [self._row(tokens[:, :stop], state)[1] for stop in inside]
            hidden, after = self._row(tokens, state)
            if watch is not None:
                for layer in range(self.config.num_layers):
                    watch(layer, index, hidden)
            found.append((hidden, [*states, after]))
        return found

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> np.ndarray:
        """Soft-capped logits [B, t, V] float32 of rows of `run`'s output [B, t, width]."""
        return to_numpy(self._head(hidden))

    def _row(self, tokens: np.ndarray, state: State) -> tuple[Tensor, State]:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._device)
        if not state[POSITION].any():
            return self._pass(ids, state)
        hidden = []
        for token in ids.unbind(1):
            after, state = self._pass(token[None], state)
            hidden.append(after)
        return torch.cat(hidden, 1), state

    def _layer_states(self, state: State) -> Iterator[tuple[int, str, Tensor, Tensor]]:
        """Index and kind of each layer, and copies of its two states in float32."""
        for index, kind in enumerate(self.config.block_types):
            first, second = (
                torch.from_numpy(state[spec.name].astype(np.float32)).to(self._device)
                for spec in layer_states(self.config, index, "float32")
            )
            yield index, kind, first, second

    def _canonical(self, count: int, found: Iterable[tuple[Tensor, Tensor]]) -> State:
        """The state after `count` tokens from the two states of each layer."""
        state: State = {POSITION: np.array([count], np.int64)}
        for index, parts in enumerate(found):
            for spec, part in zip(layer_states(self.config, index, "float32"), parts, strict=True):
                state[spec.name] = to_numpy(part)
        return state


def check_supported(
    who: str, option: str, config: GriffinConfig, rules: Mapping[str, tuple[bool, object]]
) -> None:
    """Refuses a configuration; `rules` are field → (whether it is supported, what would be).

    Raises:
        RequestError: one of the fields is not supported.
    """
    for name, (supported, expected) in rules.items():
        if not supported:
            raise RequestError(
                f"{who} cannot run this model: its {name} is {getattr(config, name)}, expected "
                f"{expected}; leave out --impl {option}"
            )


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy in float32, on the CPU."""
    return tensor.detach().float().cpu().numpy().copy()


def in_float32(weight: RowTensor, device: str) -> Tensor:
    """A whole weight on a device."""
    return torch.from_numpy(weight.whole().astype(np.float32)).to(device)
