"""Any model that llama.cpp runs behind the Session interface, for comparison with ours."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.parallelism import usable_threads
from rgexport.runtimes.llama_cpp.context import AnyContext, common_parameters, require_batch
from rgexport.runtimes.llama_cpp.library import bindings, load_model, version
from rgexport.runtimes.llama_cpp.session import UBATCH
from rgexport.runtimes.memory import available_bytes
from rgexport.runtimes.sequences import require_fitting
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.units import amount

DATA, SIZES = "sequence", "sequence_bytes"
"""Names in a state: what llama.cpp writes, uint8 [B, N], and how much of it counts, [B]."""
_ROOM = 512
"""Tokens of a sequence that there is room for at first."""
_REMEDY = "read fewer tokens (--farthest, --limit, --context)"
_NO_ROPE = -1
"""`LLAMA_ROPE_TYPE_NONE` (llama.h)."""


class AnyModelSession(Session):
    """A .gguf file of any architecture, with llama.cpp's own settings.

    Its state is in llama.cpp's own form, and only sessions of the same file take it. A transformer
    keeps keys and values of all tokens, so there is room for few at first, and for twice as many
    whenever it is used up. It goes on beyond what it was trained for, which is what is asked here.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, room: int = _ROOM, **parameters: Any
    ):
        """Loads the model.

        Args:
            path: the file.
            threads: the processors that this process may use, by default.
            room: tokens of a sequence that there is room for at first.
            parameters: of llama.cpp's context, in place of ours.

        Raises:
            RequestError: llama.cpp is missing, cannot load the file, or the model is none that
                tells the next token.
        """
        self._llama = bindings()
        self._path, self._least, self._parameters = path, room, parameters
        self._threads = usable_threads(threads)
        self._model = load_model(path)
        vocabulary = self._llama.llama_model_get_vocab(self._model.pointer)
        self._vocab_size: int = self._llama.llama_vocab_n_tokens(vocabulary)
        self._places = self._learned_places()
        self._context: AnyContext | None = None
        self._grown = False
        if self._llama.llama_model_has_encoder(self._model.pointer):
            raise self._unfit()
        self.reset()
        if not self._llama.llama_get_causal_attn(self._open.pointer):
            raise self._unfit()

    @property
    def info(self) -> SessionInfo:
        """What this session runs."""
        return SessionInfo(
            engine="llama.cpp",
            engine_version=version(),
            threads=self._threads,
            activation_dtype="float32",
            weight_bytes=self._llama.llama_model_size(self._model.pointer),
            state_bytes=self._open.saved_bytes(0),
            prefill_chunk=UBATCH,
        )

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        return self._vocab_size

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the present state; any other length of `DATA` is taken, too."""
        return {DATA: self.get_state()[DATA].shape[1:], SIZES: ()}

    @property
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""
        return self._position.copy()

    def reset(self, batch: int = 1) -> None:
        """Clears the state, and sets the number of conversations.

        There is room for few tokens again: what a model finds may depend on the room (as some
        choose the frequencies of RoPE by it), but not on what was read before.

        Raises:
            RequestError: too many for llama.cpp, or too little memory.
        """
        require_batch(batch)  # before the context that is there is closed
        if self._context is None or self._context.batch != batch or self._grown:
            if batch > 1:
                self._require_memory(batch, self._least, self._token_bytes)
            self._reopen(batch, self._least)
        self._grown = False
        self._open.clear()
        self._position = np.zeros(batch, np.int64)

    def get_rows(self, rows: range) -> State:
        """A copy of the state of some rows, each as llama.cpp writes it, followed by zeros."""
        seen = self._position[rows.start : rows.stop].copy()
        saved = [
            self._open.save(row) if count else np.empty(0, np.uint8)
            for row, count in zip(rows, seen, strict=True)
        ]
        sizes = np.array([len(data) for data in saved])
        data = np.zeros((len(rows), sizes.max(initial=0)), np.uint8)
        for row, part in zip(data, saved, strict=True):
            row[: len(part)] = part
        return {POSITION: seen, DATA: data, SIZES: sizes}

    def close(self) -> None:
        """Frees the context and the model; the session cannot be used any more."""
        if self._context is not None:
            self._context.close()
        self._context = None
        self._model.close()

    @property
    def _open(self) -> AnyContext:
        if self._context is None:
            raise ValueError("the session is closed")
        return self._context

    def _reopen(self, batch: int, room: int) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None
        parameters = common_parameters(self._vocab_size, batch, self._threads, UBATCH)
        # One cache for all rows: with several, only contexts of as many rows would take a state.
        own = {"n_ctx": room * batch, "kv_unified": True}
        for name, value in (own | self._parameters).items():
            setattr(parameters, name, value)
        self._context = AnyContext(self._model, self._vocab_size, batch, parameters)

    def _require_fitting(self, state: State) -> None:
        require_fitting(state, {DATA: np.shape(state.get(DATA, ()))[1:], SIZES: ()})

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        place, logits = slice(rows.start, rows.stop), []
        for part, wanted in self._open.calls(tokens.shape[1], num_logits):
            count = part.stop - part.start
            self._make_room(int(self._position[place].max()) + count)
            found = self._open.decode(rows, tokens[:, part], self._position[place], wanted)
            logits.append(found)
            self._position[place] += count
        return np.concatenate(logits, axis=1) if len(logits) > 1 else logits[0]

    def _set_rows(self, rows: range, state: State) -> None:
        self._make_room(int(state[POSITION].max(initial=0)), state)
        self._put(rows, state)

    def _put(self, rows: range, state: State) -> None:
        if rows == self._all:
            self._open.clear()  # what is left in between would change how the cache is filled
        for place, row in enumerate(rows):
            self._open.forget(row)
            if state[POSITION][place]:
                self._open.restore(row, state[DATA][place, : state[SIZES][place]])
        self._position[rows.start : rows.stop] = state[POSITION]

    def _make_room(self, tokens: int, coming: State | None = None) -> None:
        """Moves all rows to a larger context if there is none for so many tokens of a row.

        `coming` is what some rows will be set to.

        Raises:
            RequestError: the model has no places for so many, or there is too little memory.
        """
        context = self._open
        if self._places is not None and tokens > self._places:
            raise RequestError(
                f"{self._path} has no positions beyond the {self._places:,} tokens that it was "
                f"trained for; {_REMEDY}"
            )
        if tokens <= context.room:
            return
        room = max(tokens, 2 * context.room)
        self._require_memory(context.batch, room, self._kept(coming))
        state = self.get_state()
        self._reopen(context.batch, room)
        self._grown = True
        self._put(self._all, state)

    def _require_memory(self, batch: int, room: int, kept: float) -> None:
        """Refuses a context that would not fit, by the bytes that are kept of a token.

        Copies of the states take what the context that is there will give back.
        """
        needed, available = int(kept * room * batch), available_bytes()
        if available is not None and needed > available:
            raise RequestError(
                f"{self._path} keeps {amount(needed)} of {batch} texts of {room:,} tokens, and "
                f"{amount(available)} of memory is left; {_REMEDY}"
            )

    def _kept(self, coming: State | None) -> float:
        """Bytes that are kept of a token up to here, or of those that rows will have seen."""
        sizes = np.array([self._open.saved_bytes(row) for row in self._all])
        kept = sizes / np.maximum(self._position, 1)
        if coming is not None:
            kept = np.append(kept, coming[SIZES] / np.maximum(coming[POSITION], 1))
        return float(kept.max())

    @cached_property
    def _token_bytes(self) -> int:
        """What is kept of a token while no window is full; the session forgets what it has read."""
        self._open.clear()
        sizes = []
        for position in range(2):
            self._open.decode(range(1), np.zeros((1, 1), np.int64), np.array([position]), 0)
            sizes.append(self._open.saved_bytes(0))
        return sizes[1] - sizes[0]

    def _learned_places(self) -> int | None:
        """The most tokens where each position has an embedding; without it, llama.cpp would abort.

        Only the kind of positions is known, so models that know of no position or of distances
        alone (ALiBi) count, too.
        """
        model = self._model.pointer
        recurrent = self._llama.llama_model_is_recurrent, self._llama.llama_model_is_hybrid
        if self._llama.llama_model_rope_type(model) != _NO_ROPE or any(f(model) for f in recurrent):
            return None
        trained: int = self._llama.llama_model_n_ctx_train(model)
        return trained

    def _unfit(self) -> RequestError:
        return RequestError(
            f"{self._path} does not tell the next token of a text; expected a language model that "
            "reads from left to right"
        )
