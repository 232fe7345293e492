"""Adapts any model that llama.cpp runs to the Session interface, for comparison with ours."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.llama_cpp.session import (
    LlamaContext,
    LlamaCppSession,
    common_parameters,
    require_batch,
)
from rgexport.runtimes.machine import available_bytes
from rgexport.runtimes.session import require_fitting
from rgexport.units import amount

DATA, SIZES = "sequence", "sequence_bytes"
"""Names in a state: llama.cpp's own form, uint8 [B, N], and how many of its bytes count, [B]."""
_FIRST_CAPACITY = 512
_REMEDY = "read fewer tokens"
_NO_ROPE = -1
"""`LLAMA_ROPE_TYPE_NONE` (llama.h)."""


class AnyModelSession(LlamaCppSession):
    """A .gguf file of any architecture, with llama.cpp's own settings.

    Its state is in llama.cpp's own form, and only sessions of the same file take it. A transformer
    keeps keys and values of all tokens, so the context is small at first, and doubles whenever it
    is full. It goes on beyond the length that the model was trained for.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        capacity: int = _FIRST_CAPACITY,
        **parameters: Any,
    ):
        """Loads the model.

        Args:
            path: the file.
            threads: the processors that this process may use, by default.
            capacity: tokens of a sequence that the context can take at first.
            parameters: of llama.cpp's context, in place of ours.

        Raises:
            RequestError: llama.cpp is missing, cannot load the file, or the model does not tell
                the next token.
        """
        self._load(path, threads)
        self._path, self._first_capacity, self._parameters = path, capacity, parameters
        self._max_positions = self._learned_positions()
        self._has_grown = False
        if self._llama.llama_model_has_encoder(self._model.pointer):
            raise self._not_causal()
        self.reset()
        if not self._llama.llama_get_causal_attn(self._open.pointer):
            raise self._not_causal()

    @property
    def _state_bytes(self) -> int:
        return self._open.saved_bytes(0)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the present state; any other length of `DATA` is taken, too."""
        return {DATA: self.get_state()[DATA].shape[1:], SIZES: ()}

    def reset(self, batch: int = 1) -> None:
        """Clears the state, and sets the number of conversations.

        The context is small again: a model's results may depend on its size (some choose the
        frequencies of RoPE by it), but not on earlier texts.
        """
        require_batch(batch)  # before the present context is closed
        if self._context is None or self._context.batch != batch or self._has_grown:
            if batch > 1:
                self._require_memory(batch, self._first_capacity, self._token_bytes)
            self._reopen(batch, self._first_capacity)
        self._has_grown = False
        self._open.clear()
        self._position = np.zeros(batch, np.int64)

    def get_rows(self, rows: range) -> State:
        """Returns the state of some rows, each as llama.cpp writes it, followed by zeros."""
        seen = self._position[rows.start : rows.stop].copy()
        saved = [
            self._open.save(row) if count else np.empty(0, np.uint8)
            for row, count in zip(rows, seen, strict=True)
        ]
        sizes = np.array([len(data) for data in saved])
        data = np.zeros((len(rows), sizes.max(initial=0)), np.uint8)
        for row, content in zip(data, saved, strict=True):
            row[: len(content)] = content
        return {POSITION: seen, DATA: data, SIZES: sizes}

    def _reopen(self, batch: int, capacity: int) -> None:
        self._close_context()
        parameters = common_parameters(self.vocab_size, batch, self._threads, self._ubatch)
        # One cache for all rows: with several, only contexts of as many rows would take a state.
        defaults = {"n_ctx": capacity * batch, "kv_unified": True}
        for name, value in (defaults | self._parameters).items():
            setattr(parameters, name, value)
        self._context = LlamaContext(self._model, self.vocab_size, batch, parameters)

    def _require_fitting(self, state: State) -> None:
        require_fitting(state, {DATA: np.shape(state.get(DATA, ()))[1:], SIZES: ()})

    def _decode(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        span, count = slice(rows.start, rows.stop), tokens.shape[1]
        self._grow_for(int(self._position[span].max()) + count)
        logits = self._open.decode(rows, tokens, self._position[span], num_logits)
        self._position[span] += count
        return logits

    def _set_rows(self, rows: range, state: State) -> None:
        self._grow_for(int(state[POSITION].max(initial=0)), state)
        self._restore(rows, state)

    def _restore(self, rows: range, state: State) -> None:
        if rows == self._all:
            self._open.clear()  # gaps would change how the cache is filled
        for index, row in enumerate(rows):
            self._open.forget(row)
            if state[POSITION][index]:
                self._open.restore(row, state[DATA][index, : state[SIZES][index]])
        self._position[rows.start : rows.stop] = state[POSITION]

    def _grow_for(self, tokens: int, next_state: State | None = None) -> None:
        """Moves all rows to a larger context if a row cannot take so many tokens.

        `next_state` is what some rows will be set to.

        Raises:
            RequestError: the model has no positions for so many, or there is too little memory.
        """
        context = self._open
        if self._max_positions is not None and tokens > self._max_positions:
            raise RequestError(
                f"{self._path} has no positions beyond the {self._max_positions:,} tokens that it "
                f"was trained for; {_REMEDY}"
            )
        if tokens <= context.capacity:
            return
        capacity = max(tokens, 2 * context.capacity)
        self._require_memory(context.batch, capacity, self._state_bytes_per_token(next_state))
        state = self.get_state()
        self._reopen(context.batch, capacity)
        self._has_grown = True
        self._restore(self._all, state)

    def _require_memory(self, batch: int, capacity: int, token_bytes: float) -> None:
        """Refuses a context that would not fit.

        Copies of the states take what the present context will give back.
        """
        needed, available = int(token_bytes * capacity * batch), available_bytes()
        if available is not None and needed > available:
            raise RequestError(
                f"{self._path} keeps {amount(needed)} of {batch} texts of {capacity:,} tokens, and "
                f"{amount(available)} of memory is left; {_REMEDY}"
            )

    def _state_bytes_per_token(self, next_state: State | None) -> float:
        """Returns the most bytes that a row's state has, or will have, per token."""
        sizes = np.array([self._open.saved_bytes(row) for row in self._all])
        ratios = sizes / np.maximum(self._position, 1)
        if next_state is not None:
            ratios = np.append(ratios, next_state[SIZES] / np.maximum(next_state[POSITION], 1))
        return float(ratios.max())

    @cached_property
    def _token_bytes(self) -> int:
        """Bytes of a token in the state while no window is full. Clears the session."""
        self._open.clear()
        sizes = []
        for position in range(2):
            self._open.decode(range(1), np.zeros((1, 1), np.int64), np.array([position]), 0)
            sizes.append(self._open.saved_bytes(0))
        return sizes[1] - sizes[0]

    def _learned_positions(self) -> int | None:
        """Returns the most tokens if each position has an embedding: llama.cpp aborts beyond.

        llama.cpp tells only the kind of positions, so models without positions or with distances
        alone (ALiBi) count, too.
        """
        model = self._model.pointer
        recurrent = self._llama.llama_model_is_recurrent, self._llama.llama_model_is_hybrid
        if self._llama.llama_model_rope_type(model) != _NO_ROPE or any(f(model) for f in recurrent):
            return None
        trained: int = self._llama.llama_model_n_ctx_train(model)
        return trained

    def _not_causal(self) -> RequestError:
        return RequestError(
            f"{self._path} does not tell the next token of a text; expected a language model that "
            "reads from left to right"
        )
