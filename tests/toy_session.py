"""A toy engine behind the Session interface."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import Session, SessionInfo

MEMORY, SIZE = "layers.0.rg_lru", 8


class ToySession(Session):
    """A recurrence h = tanh(M·h + E[token]) whose state tells any two sequences apart.

    It continues with the tokens of `script` as long as there are some, then as it likes; it
    raises `failure` instead of its `failing_step`-th step.
    """

    info = SessionInfo("toy", "1", 1, "float32", 0, 0, 64)
    vocab_size = 0
    position = np.zeros(0, np.int64)
    state_shapes: ClassVar = {MEMORY: (SIZE,)}

    def __init__(self, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        self._embedding = rng.standard_normal((vocab_size, SIZE))
        self._mix = rng.standard_normal((SIZE, SIZE)) / 3
        self.vocab_size = vocab_size
        self.script: list[int] = []
        self.fed = 0
        self.calls: list[tuple[int, int]] = []
        """Rows and tokens of each call."""
        self.failure: BaseException | None = None
        self.failing_step = 0
        self.reset()

    def reset(self, batch: int = 1) -> None:
        self._hidden = np.zeros((batch, SIZE))
        self.position = np.zeros(batch, np.int64)

    def get_rows(self, rows: range) -> State:
        place = slice(rows.start, rows.stop)
        return {MEMORY: self._hidden[place].copy(), POSITION: self.position[place].copy()}

    def close(self) -> None:
        self.reset()

    def _set_rows(self, rows: range, state: State) -> None:
        self._hidden[rows.start : rows.stop] = state[MEMORY]
        self.position[rows.start : rows.stop] = state[POSITION]

    def _verify(self, rows: range, tokens: np.ndarray) -> np.ndarray:
        self._before = self.get_rows(rows)
        return self._take(rows, tokens, tokens.shape[1])

    def _accept(self, rows: range, tokens: np.ndarray, counts: Sequence[int]) -> None:
        for index, count in enumerate(counts):
            row = range(rows[index], rows[index] + 1)
            self._set_rows(row, {n: array[index : index + 1] for n, array in self._before.items()})
            if count:
                self._take(row, tokens[index : index + 1, :count], 1)

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        self.calls.append((len(rows), tokens.shape[1]))
        place = slice(rows.start, rows.stop)
        if tokens.shape[1] == 1:
            self.failing_step -= 1
            self._hidden[place] += 1e-3 if self.failure else 0  # a step that fails leaves a mess
            if self.failure and self.failing_step == 0:
                raise self.failure
        hidden = []
        for column in tokens.T:
            before = self._hidden[place] @ self._mix
            self._hidden[place] = np.tanh(before + self._embedding[column])
            hidden.append(self._hidden[place].copy())
        self.position[place] += tokens.shape[1]
        self.fed += tokens.size
        if self.script:
            return np.eye(self.vocab_size, dtype=np.float32)[[[self.script.pop(0)]]]
        return (np.stack(hidden[-num_logits:], 1) @ self._embedding.T).astype(np.float32)
