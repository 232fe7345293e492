"""The interface that every engine implements."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rgexport.griffin.state import State


@dataclass(frozen=True)
class SessionInfo:
    """What a session runs, for reports."""

    engine: str
    engine_version: str
    threads: int
    activation_dtype: str
    weight_bytes: int
    """Bytes of weights that one decode step reads."""
    state_bytes: int
    """Bytes of state of one sequence."""
    prefill_chunk: int
    """Most tokens of a prefill for which the weights are read once."""
    chunk_logits: bool = True
    """Whether a chunk can return the logits of all its tokens; if not, it takes single steps."""
    whole_chunks: bool = False
    """Whether tokens that do not fill a chunk are taken in single steps."""
    kernels: str = "stock"
    """`native` and an instruction set where our kernels run, `stock` where only the engine's do."""

    @property
    def title(self) -> str:
        """Engine, version and kernels, as text."""
        return f"{self.engine} {self.engine_version}, {self.kernels} kernels"


class Session(Protocol):
    """A model in an engine, with the state of `batch` conversations.

    The rows of a batch take the same number of tokens in one call. Logits are float32.
    """

    @property
    def info(self) -> SessionInfo:
        """What this session runs."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        ...

    @property
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""
        ...

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [B, T], T ≥ 1, in chunks of the session's choice.

        Returns the logits of the last `num_logits` tokens, [B, num_logits, vocab].
        """
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Takes one token a row, [B]; returns its logits, [B, vocab]."""
        ...

    def reset(self, batch: int = 1) -> None:
        """Clears the state, and sets the number of conversations."""
        ...

    def get_state(self) -> State:
        """A copy of the canonical state."""
        ...

    def set_state(self, state: State) -> None:
        """Continues from a canonical state, of any batch size, by any engine.

        Raises:
            RequestError: a name or shape does not fit this model; dtypes are converted.
        """
        ...

    def close(self) -> None:
        """Frees the artifact's files and memory; the session cannot be used any more."""
        ...
