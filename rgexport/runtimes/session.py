"""The interface that every engine implements."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.sequences import checked_tokens, require_fitting
from rgexport.runtimes.unchanged_files import UnchangedFiles


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
    exact_tokens: int = 1
    """Up to so many tokens of a call, of all rows together, give the bits that each gives alone."""
    kernels: str = "stock"
    """`native` and an instruction set where our kernels run, `stock` where only the engine's do."""

    @property
    def title(self) -> str:
        """Engine, version and kernels, as text."""
        return f"{self.engine} {self.engine_version}, {self.kernels} kernels"


class Session(ABC):
    """A model in an engine, with the state of `batch` conversations.

    Neighbouring rows of the batch can be used without the others, so that conversations at
    different positions come and go. The rows of one call take the same number of tokens. Logits
    are float32.
    """

    _opened_files: Sequence[UnchangedFiles] = ()
    """The files that `require_unchanged` compares."""
    _tried: tuple[range, np.ndarray] | None = None
    """The rows and tokens that `accept` is about."""

    @property
    @abstractmethod
    def info(self) -> SessionInfo:
        """What this session runs."""
        ...

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of logits per token."""
        ...

    @property
    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape without the batch axis of each canonical state but the position."""
        ...

    @property
    @abstractmethod
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""
        ...

    @abstractmethod
    def reset(self, batch: int = 1) -> None:
        """Clears the state, and sets the number of conversations.

        Raises:
            RequestError: a file of the artifact changed while the session was open.
        """
        ...

    @abstractmethod
    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        """As `take`; tokens and `num_logits` are checked."""
        ...

    def _verify(self, rows: range, tokens: np.ndarray) -> np.ndarray:
        """As `verify`, of tokens that are checked."""
        self._before = self.get_rows(rows)
        return self._take(rows, tokens, tokens.shape[1])

    def _accept(self, rows: range, tokens: np.ndarray, counts: Sequence[int]) -> None:
        """As `accept`, of the tokens of the last `_verify`: from the states before it."""
        for place, count in enumerate(counts):
            if count == tokens.shape[1]:
                continue
            row = range(rows[place], rows[place] + 1)
            self._set_rows(row, {n: array[place : place + 1] for n, array in self._before.items()})
            if count:
                self._take(row, tokens[place : place + 1, :count], 1)
        del self._before

    @abstractmethod
    def get_rows(self, rows: range) -> State:
        """A copy of the canonical state of some rows."""
        ...

    @abstractmethod
    def _set_rows(self, rows: range, state: State) -> None:
        """As `set_rows`; the state fits the model."""
        ...

    def take(self, rows: range, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [R, T], T ≥ 1, of some rows, in chunks of the session's choice.

        Returns the logits of the last `num_logits` tokens, [R, num_logits, vocab].

        Raises:
            RequestError: another shape, or an id outside of the vocabulary.
        """
        tokens = checked_tokens(tokens, len(rows), self.vocab_size)
        return self._take(rows, tokens, max(1, min(num_logits, tokens.shape[1])))

    def verify(self, rows: range, tokens: np.ndarray) -> np.ndarray:
        """Takes tokens [R, T], T ≥ 1, of some rows on trial; `accept` must be the next call.

        Returns the logits of all of them, [R, T, vocab]: those of single steps to the last bit, up
        to `info.exact_tokens`.

        Raises:
            RequestError: another shape, or an id outside of the vocabulary.
        """
        tokens = checked_tokens(tokens, len(rows), self.vocab_size)
        logits = self._verify(rows, tokens)
        self._tried = rows, tokens
        return logits

    def accept(self, counts: Sequence[int]) -> None:
        """Keeps so many of the first tokens of each row of the last `verify`: 0 to all of them.

        Raises:
            ValueError: there are not so many, or `verify` was not the call before.
        """
        if self._tried is None:
            raise ValueError("no tokens are on trial: call verify first")
        rows, tokens = self._tried
        if len(counts) != len(rows) or not all(0 <= n <= tokens.shape[1] for n in counts):
            raise ValueError(f"{counts} tokens cannot be kept of {list(tokens.shape)} on trial")
        self._tried = None
        self._accept(rows, tokens, counts)

    def set_rows(self, rows: range, state: State) -> None:
        """Lets some rows continue from a canonical state of as many, by any engine.

        Raises:
            RequestError: a name or shape does not fit this model (dtypes are converted), or a file
                of the artifact changed while the session was open.
        """
        self._require_fitting(state)
        self._set_rows(rows, state)

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """As `take`, for all rows: tokens [B, T]; returns logits [B, num_logits, vocab]."""
        return self.take(self._all, tokens, num_logits)

    def prefill_at_once(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """As `prefill`, in one run of the model where the engine takes any number of tokens.

        Memory grows with their number; other programs take whole prompts so.
        """
        return self.prefill(tokens, num_logits)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Takes one token a row, [B]; returns its logits, [B, vocab]."""
        return self.take(self._all, np.reshape(tokens, (-1, 1)))[:, 0]

    def get_state(self) -> State:
        """A copy of the canonical state of all rows."""
        return self.get_rows(self._all)

    def set_state(self, state: State) -> None:
        """Continues from a canonical state, of any batch size, by any engine.

        Raises:
            RequestError: see `set_rows`.
        """
        self._require_fitting(state)
        if len(state[POSITION]) != len(self._all):
            self.reset(len(state[POSITION]))
        self._set_rows(self._all, state)

    def _require_fitting(self, state: State) -> None:
        """Refuses a state of another model."""
        require_fitting(state, self.state_shapes)

    @property
    def _all(self) -> range:
        return range(len(self.position))

    def require_unchanged(self) -> None:
        """Checks that the artifact's files are those that were opened. Any thread may call it.

        Raises:
            RequestError: one was written to, cut, replaced or removed.
        """
        for files in self._opened_files:
            files.require()

    @abstractmethod
    def close(self) -> None:
        """Frees the artifact's files and memory; the session cannot be used any more."""
        ...
