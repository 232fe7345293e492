"""A toy engine behind the Session interface."""

import numpy as np

from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.session import SessionInfo


class ToySession:
    """A recurrence h = tanh(M·h + E[token]) whose state tells any two sequences apart.

    It continues with the tokens of `script` as long as there are some, then as it likes; it
    raises `failure` instead of its `failing_step`-th step.
    """

    def __init__(self, vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        self._embedding = rng.standard_normal((vocab_size, 8))
        self._mix = rng.standard_normal((8, 8)) / 3
        self.vocab_size = vocab_size
        self.info = SessionInfo("toy", "1", 1, "float32", 0, 0, 64)
        self.script: list[int] = []
        self.fed = 0
        self.failure: BaseException | None = None
        self.failing_step = 0
        self.reset()

    @property
    def position(self) -> np.ndarray:
        return self._position.copy()

    def reset(self, batch: int = 1) -> None:
        self._hidden = np.zeros((batch, 8))
        self._position = np.zeros(batch, np.int64)

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        assert num_logits == 1
        for column in tokens.T:
            self._take(column)
        return self._logits()[:, None]

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self.failing_step -= 1
        self._hidden += 1e-3 if self.failure else 0  # a step that fails leaves a mess
        if self.failure and self.failing_step == 0:
            raise self.failure
        self._take(tokens)
        return self._logits()

    def get_state(self) -> State:
        return {"layers.0.rg_lru": self._hidden.copy(), POSITION: self._position.copy()}

    def set_state(self, state: State) -> None:
        self._hidden = state["layers.0.rg_lru"].copy()
        self._position = state[POSITION].copy()

    def _take(self, tokens: np.ndarray) -> None:
        self._hidden = np.tanh(self._hidden @ self._mix + self._embedding[tokens])
        self._position = self._position + 1
        self.fed += 1

    def _logits(self) -> np.ndarray:
        if self.script:
            return np.eye(self.vocab_size, dtype=np.float32)[[self.script.pop(0)]]
        return (self._hidden @ self._embedding.T).astype(np.float32)
