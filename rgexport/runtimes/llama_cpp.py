"""llama.cpp behind the Session interface: the sequences of one context are the batch."""

import ctypes
import dataclasses
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.runtimes.llama_cpp_library import (
    Handle,
    bindings,
    complaint,
    load_model,
    logged,
    version,
)
from rgexport.runtimes.llama_cpp_state import TYPES, Layout, pack, unpack
from rgexport.runtimes.sequences import checked_tokens, require_fitting, usable_processors
from rgexport.runtimes.session import SessionInfo

UBATCH = 512
"""Tokens that llama.cpp takes through the layers at once; its own default."""
LOGITS_BYTES = 64 << 20
"""Of one call: llama.cpp reserves memory for as many as a call may ask for."""
LAST_POSITION = 2**31 - 1
"""llama.cpp counts positions in 32 bits."""

_ALL_F32, _FLOATS = 0, (0, 1, 32)
"""`LLAMA_FTYPE_ALL_F32`; that, `MOSTLY_F16` and `MOSTLY_BF16` (llama.h)."""


class LlamaCppSession:
    """A .gguf file in the llama.cpp of the installed llama-cpp-python.

    Keys and values are kept in float32 where all weights are, otherwise in float16: its rounding,
    1e-4 of the logits, is lost beside that of the weights. Flash attention, which saves a third
    of the attention's time in a step, is used where weights are quantized: on a CPU it rounds
    queries too and sums in float16 (2e-3 of the logits behind a full window).
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        ubatch: int = UBATCH,
        flash_attention: bool | None = None,
        cache_type: str | None = None,
        mmap: bool = True,
    ):
        """Loads the model.

        Args:
            artifact: a GGUF file.
            threads: the processors that this process may use, by default.
            ubatch: most tokens that go through the layers at once.
            flash_attention: whether attention is one fused operation; None leaves it to us.
            cache_type: `float32` or `float16` for keys and values; None leaves it to us.
            mmap: whether weights may stay in the file's pages, where llama.cpp can use them so.

        Raises:
            RequestError: no llama-cpp-python that knows RecurrentGemma, or it cannot load the
                file.
        """
        self._llama = bindings()
        self._config = artifact.manifest.config
        self._path = artifact.path
        self._threads = threads or usable_processors()
        self._ubatch = ubatch
        self._model = load_model(artifact.path, mmap=mmap)
        self._require_vocabulary()
        stored = self._llama.llama_model_ftype(self._model.pointer)
        self._cache_type = cache_type or ("float32" if stored == _ALL_F32 else "float16")
        self._flash_attention = (
            stored not in _FLOATS if flash_attention is None else flash_attention
        )
        self._context: Handle | None = None
        self._position = np.zeros(0, np.int64)
        self.reset()

    @property
    def info(self) -> SessionInfo:
        """What this session runs."""
        return SessionInfo(
            engine="llama.cpp",
            engine_version=version(),
            threads=self._threads,
            activation_dtype="float32",
            weight_bytes=self._llama.llama_model_size(self._model.pointer),
            state_bytes=sum(
                int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize for spec in self._specs
            ),
            prefill_chunk=self._ubatch,
        )

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        return self._config.vocab_size

    @property
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""
        return self._position.copy()

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [B, T], T ≥ 1; returns the last `num_logits` logits, [B, n, vocab]."""
        tokens = checked_tokens(tokens, len(self._position), self.vocab_size)
        count = tokens.shape[1]
        first = count - max(1, min(num_logits, count))
        for start in range(0, first, self._chunk):
            self._decode(tokens[:, start : min(start + self._chunk, first)], wanted=False)
        step = min(self._chunk, self._logit_rows)
        parts = [self._decode(tokens[:, i : i + step]) for i in range(first, count, step)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Takes one token a row, [B]; returns its logits, [B, vocab]."""
        return self.prefill(np.reshape(tokens, (-1, 1)))[:, 0]

    def reset(self, batch: int = 1) -> None:
        """Forgets everything; from now on `batch` conversations.

        Raises:
            RequestError: more than llama.cpp can hold, or no memory for them.
        """
        if batch != len(self._position):
            self._open_context(batch)
        self._llama.llama_memory_clear(self._memory, True)
        self._position = np.zeros(batch, np.int64)
        self._counted = 0

    def get_state(self) -> State:
        """A copy of the canonical state.

        What llama.cpp holds is laid out anew from the copy: so the session goes on exactly, to
        the last bit, as any session does that the copy is given to.
        """
        state = {
            spec.name: np.zeros((len(self._position), *spec.shape), spec.dtype)
            for spec in self._specs
        } | {POSITION: self.position}
        for sequence in np.flatnonzero(self._position).tolist():
            for name, array in unpack(self._get(sequence), self._layout).items():
                state[name][sequence] = array
        self._fill(state)
        return state

    def set_state(self, state: State) -> None:
        """Continues from a canonical state of any batch size, by any engine.

        Raises:
            RequestError: a name or shape that does not fit this model, or a position that
                llama.cpp cannot count.
        """
        require_fitting(state, {spec.name: spec.shape for spec in self._specs})
        furthest = int(state[POSITION].max(initial=0))
        if furthest > LAST_POSITION:
            raise RequestError(
                f"the state has seen {furthest} tokens; llama.cpp counts to {LAST_POSITION}"
            )
        self.reset(len(state[POSITION]))
        self._fill(state)

    def close(self) -> None:
        """Frees the context and the model; the session cannot be used any more."""
        self._close_context()
        self._model.close()

    @property
    def _specs(self) -> list[StateSpec]:
        """The states as llama.cpp keeps them."""
        return [
            dataclasses.replace(spec, dtype="float32") if spec.name.endswith(".conv1d") else spec
            for spec in state_specs(self._config, self._cache_type)
        ]

    @property
    def _pointer(self) -> Any:
        assert self._context is not None
        return self._context.pointer

    def _require_vocabulary(self) -> None:
        vocabulary = self._llama.llama_model_get_vocab(self._model.pointer)
        found = self._llama.llama_vocab_n_tokens(vocabulary)
        if found != self._config.vocab_size:
            raise RequestError(
                f"{self._path} is damaged: its vocabulary has {found} tokens, its manifest says "
                f"{self._config.vocab_size}; export it again"
            )

    def _open_context(self, batch: int) -> None:
        most = self._llama.llama_max_parallel_sequences()
        if not 1 <= batch <= most:
            raise RequestError(f"{batch} conversations at once; llama.cpp takes 1 to {most}")
        self._close_context()
        parameters = self._parameters(batch)
        with logged():
            pointer = self._llama.llama_init_from_model(self._model.pointer, parameters)
            context = Handle(pointer, self._llama.llama_free, keep=self._model)
        if not pointer:
            raise RequestError(f"llama.cpp cannot run {self._path}: {complaint()}")
        self._context = context
        self._memory = self._llama.llama_get_memory(pointer)
        self._room = self._llama.llama_n_ctx_seq(pointer)
        self._chunk = parameters.n_batch // batch
        self._logit_rows = parameters.n_outputs_max // batch
        self._sequences = np.arange(batch, dtype=np.int32)
        self._layout = Layout(self._config, self._cache_type, not self._flash_attention, batch)

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context, self._position = None, np.zeros(0, np.int64)

    def _parameters(self, batch: int) -> Any:
        parameters = self._llama.llama_context_default_params()
        tokens = max(self._ubatch, batch)
        rows = min(tokens, LOGITS_BYTES // (4 * self.vocab_size))
        values = {
            "n_ctx": 2 * (self._config.window + 1 + self._ubatch) * batch,
            "n_batch": tokens,
            "n_ubatch": self._ubatch,
            "n_seq_max": batch,
            "n_outputs_max": max(rows, batch),
            "n_threads": self._threads,
            "n_threads_batch": self._threads,
            "flash_attn_type": int(self._flash_attention),
            "type_k": TYPES[self._cache_type],
            "type_v": TYPES[self._cache_type],
            "swa_full": False,
            "kv_unified": False,
            "no_perf": True,
        }
        for name, value in values.items():
            setattr(parameters, name, value)
        return parameters

    def _decode(self, tokens: np.ndarray, wanted: bool = True) -> np.ndarray:
        """One call of llama.cpp with tokens [B, T]; logits [B, T, vocab] if they are wanted."""
        batch, count = tokens.shape
        if self._counted + count > self._room:
            self._make_room()
        with logged():
            status = self._llama.llama_decode(self._pointer, self._batch(tokens, wanted))
        if status != 0:
            raise RequestError(f"llama.cpp stopped with status {status}: {complaint()}")
        self._position += count
        self._counted += count
        if not wanted:
            return np.empty((batch, 0, self.vocab_size), np.float32)
        logits = self._llama.llama_get_logits(self._pointer)
        shape = batch, count, self.vocab_size
        return np.ctypeslib.as_array(logits, shape).copy()

    def _make_room(self) -> None:
        """Lets llama.cpp forget the tokens behind the window.

        Beside the cache of the window it keeps one for layers without a window. There are none,
        but every token takes a cell of it until the context is full. A state does not hold that
        cache, so once it is laid out anew all cells are free again: there is no last token.
        """
        self.get_state()

    def _batch(self, tokens: np.ndarray, wanted: bool) -> Any:
        """All tokens of the first sequence, then those of the next; it holds its arrays."""
        batch, count = tokens.shape
        sequence = np.repeat(self._sequences, count)
        columns = {
            "token": tokens.astype(np.int32).reshape(-1),
            "pos": (self._position[:, None] + np.arange(count)).astype(np.int32).reshape(-1),
            "n_seq_id": np.ones(batch * count, np.int32),
            "seq_id": self._sequences.ctypes.data + 4 * sequence.astype(np.uintp),
            "logits": np.full(batch * count, wanted, np.int8),
        }
        found = self._llama.llama_batch(n_tokens=batch * count)
        for name, array in columns.items():
            setattr(found, name, ctypes.cast(array.ctypes.data, type(getattr(found, name))))
        found.arrays = columns
        return found

    def _get(self, sequence: int) -> bytes:
        """What llama.cpp holds of one sequence."""
        flags = self._llama.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = self._llama.llama_state_seq_get_size_ext(self._pointer, sequence, flags)
        buffer = (ctypes.c_uint8 * size)()
        done = self._llama.llama_state_seq_get_data_ext(
            self._pointer, buffer, size, sequence, flags
        )
        if not size or done != size:
            raise RequestError(f"llama.cpp cannot save its state: {complaint()}")
        return bytes(buffer)

    def _fill(self, state: State) -> None:
        """Puts a state that fits into the context, and forgets what was there."""
        self._llama.llama_memory_clear(self._memory, True)
        self._position = np.array(state[POSITION], np.int64)
        self._counted = 0
        flags = self._llama.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        for sequence in np.flatnonzero(self._position).tolist():
            row = {name: array[sequence] for name, array in state.items()}
            data = pack(row, self._layout)
            buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
            done = self._llama.llama_state_seq_set_data_ext(
                self._pointer, buffer, len(data), sequence, flags
            )
            if done != len(data):
                raise RequestError(f"llama.cpp cannot restore the state: {complaint()}")
