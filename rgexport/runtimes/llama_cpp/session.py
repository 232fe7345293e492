"""llama.cpp behind the Session interface: the sequences of one context are the batch."""

import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.gguf.naming import ARCHITECTURE
from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.parallelism import usable_threads
from rgexport.runtimes.llama_cpp import library
from rgexport.runtimes.llama_cpp.state import TYPES, StateLayout, pack, unpack
from rgexport.runtimes.session import Session, SessionInfo, UnchangedFiles

LOGITS_BYTES = 64 << 20
"""Most logits of one call: llama.cpp reserves memory for as many as a call may ask for."""
UBATCH = 512
"""Most tokens that go through the layers at once; llama.cpp's own default."""
LAST_POSITION = 2**31 - 1
"""llama.cpp counts positions in 32 bits."""

_WINDOW = f"{ARCHITECTURE}.attention.sliding_window"  # the window's key, the token itself included
_ALL_F32, _FLOATS = 0, (0, 1, 32)  # `LLAMA_FTYPE_ALL_F32`; with `MOSTLY_F16` and `MOSTLY_BF16`


class LlamaContext:
    """The memory of `batch` sequences in llama.cpp; it keeps its model and `keep` alive.

    A sequence can take `capacity` tokens, one call `chunk` tokens and `rows` logits of each.
    """

    def __init__(
        self,
        model: library.Handle,
        vocab_size: int,
        batch: int,
        parameters: Any,
        *,
        flags: int = 0,
        keep: Any = None,
    ) -> None:
        self._llama = library.bindings()
        with library.logged():
            pointer = self._llama.llama_init_from_model(model.pointer, parameters)
            self._handle = library.Handle(pointer, self._llama.llama_free, keep=(model, keep))
        if not pointer:
            raise RequestError(f"llama.cpp cannot run this model: {library.complaint()}")
        self.pointer = pointer
        self.memory = self._llama.llama_get_memory(pointer)
        self._vocab_size, self._flags, self.batch = vocab_size, flags, batch
        self._sequence_ids = np.arange(batch, dtype=np.int32)
        shared = batch if parameters.kv_unified else 1
        self.capacity: int = self._llama.llama_n_ctx_seq(pointer) // shared
        self.chunk: int = self._llama.llama_n_batch(pointer) // batch
        self.rows: int = parameters.n_outputs_max // batch

    def calls(self, count: int, num_logits: int) -> Iterator[tuple[slice, int]]:
        """Cuts `count` tokens into the calls they take; yields each with its number of logits."""
        first, start = count - num_logits, 0
        while start < count:
            stop = min(start + self.chunk, max(first, start) + self.rows, count)
            yield slice(start, stop), max(0, stop - max(first, start))
            start = stop

    def decode(
        self, sequences: range, tokens: np.ndarray, positions: np.ndarray, num_logits: int
    ) -> np.ndarray:
        """Takes tokens [S, T], T ≤ `chunk`, of sequences that have seen `positions` [S].

        Returns the last `num_logits` ≤ `rows` logits, [S, num_logits, vocab].
        """
        with library.logged():
            batch = self._batch(sequences, tokens, positions, num_logits)
            status = self._llama.llama_decode(self.pointer, batch)
        if status != 0:
            raise RequestError(f"llama.cpp stopped with status {status}: {library.complaint()}")
        shape = len(tokens), num_logits, self._vocab_size
        if not num_logits:
            return np.empty(shape, np.float32)
        logits = self._llama.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(logits, shape).copy()

    def clear(self) -> None:
        self._llama.llama_memory_clear(self.memory, True)

    def forget(self, sequence: int) -> None:
        self._llama.llama_memory_seq_rm(self.memory, sequence, -1, -1)

    def saved_bytes(self, sequence: int) -> int:
        return int(self._llama.llama_state_seq_get_size_ext(self.pointer, sequence, self._flags))

    def save(self, sequence: int) -> np.ndarray:
        """Returns the state of a sequence that has seen a token, in llama.cpp's form, uint8 [N]."""
        data = np.empty(self.saved_bytes(sequence), np.uint8)
        if not self._transfer(self._llama.llama_state_seq_get_data_ext, data, sequence):
            raise RequestError(f"llama.cpp cannot save its state: {library.complaint()}")
        return data

    def restore(self, sequence: int, data: np.ndarray) -> None:
        if not self._transfer(self._llama.llama_state_seq_set_data_ext, data, sequence):
            raise RequestError(f"llama.cpp cannot restore the state: {library.complaint()}")

    def close(self) -> None:
        self._handle.close()

    def _transfer(self, function: Any, data: np.ndarray, sequence: int) -> bool:
        address = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        with library.logged():
            size = function(self.pointer, address, data.size, sequence, self._flags)
        return bool(size == data.size > 0)

    def _batch(
        self, sequences: range, tokens: np.ndarray, positions: np.ndarray, num_logits: int
    ) -> Any:
        batch, count = tokens.shape
        addresses = self._sequence_ids.ctypes.data + 4 * np.array(sequences, np.uintp)
        last = np.arange(count) >= count - num_logits
        columns = {
            "token": tokens.astype(np.int32).ravel(),
            "pos": (positions[:, None] + np.arange(count)).astype(np.int32).ravel(),
            "n_seq_id": np.ones(batch * count, np.int32),
            "seq_id": np.repeat(addresses, count),
            "logits": np.tile(last, batch).astype(np.int8),
        }
        structure = self._llama.llama_batch(n_tokens=batch * count)
        for name, array in columns.items():
            pointer = ctypes.cast(array.ctypes.data, type(getattr(structure, name)))
            setattr(structure, name, pointer)
        structure.arrays = columns
        return structure


class LlamaCppSession(Session):
    """A .gguf file in the llama.cpp of the installed llama-cpp-python.

    Keys and values are float32 if all weights are, otherwise float16, whose rounding (1e-4 of the
    logits) is small beside that of the weights. Flash attention, which saves a third of the
    attention's time in a step, is used if weights are quantized: on a CPU it rounds queries too and
    sums in float16 (2e-3 of the logits after a full window).

    Beside the cache of the window, llama.cpp keeps one for layers without a window. There are no
    such layers, but every token takes a cell of it, so only this cache can become full. A saved
    state does not include it: writing one frees all of its cells.
    """

    _ubatch = UBATCH

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        ubatch: int = UBATCH,
        flash_attention: bool | None = None,
        mmap: bool = True,
        window: int | None = None,
        watch: Any = None,
    ):
        """Loads the model, perhaps with a smaller window; at 0, a token sees only itself."""
        self._config = artifact.manifest.config
        self._opened_files = (UnchangedFiles(artifact),)
        self._ubatch, self._watch, metadata = ubatch, watch, {}
        if window is not None:
            metadata = {_WINDOW: window + 1}
            # The state keeps one key where the window is 0: no later token sees it.
            self._config = dataclasses.replace(self._config, window=max(1, window))
        self._load(artifact.path, threads, mmap=mmap, metadata=metadata)
        if self.vocab_size != self._config.vocab_size:
            raise RequestError(
                f"{artifact.path} is damaged: its vocabulary has {self.vocab_size} tokens, its "
                f"manifest says {self._config.vocab_size}; export it again"
            )
        stored = self._llama.llama_model_ftype(self._model.pointer)
        self._flash = stored not in _FLOATS if flash_attention is None else flash_attention
        self._cache_type = "float32" if stored == _ALL_F32 else "float16"
        self.reset()

    def _load(self, path: Path, threads: int | None, **options: Any) -> None:
        self._llama = library.bindings()
        self._threads = usable_threads(threads)
        self._model = library.load_model(path, **options)
        vocabulary = self._llama.llama_model_get_vocab(self._model.pointer)
        self.vocab_size = int(self._llama.llama_vocab_n_tokens(vocabulary))
        self._context: LlamaContext | None = None

    @property
    def info(self) -> SessionInfo:
        return SessionInfo(
            engine="llama.cpp",
            engine_version=library.version(),
            threads=self._threads,
            activation_dtype="float32",
            weight_bytes=self._llama.llama_model_size(self._model.pointer),
            state_bytes=self._state_bytes,
            prefill_chunk=self._ubatch,
        )

    @property
    def _state_bytes(self) -> int:
        return int(sum(np.prod(s.shape) * np.dtype(s.dtype).itemsize for s in self._specs))

    @property
    def position(self) -> np.ndarray:
        return self._position.copy()

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {spec.name: spec.shape for spec in self._specs}

    def reset(self, batch: int = 1) -> None:
        self.require_unchanged()
        require_batch(batch)  # before the present context is closed
        if self._context is None or self._context.batch != batch:
            self._close_context()
            self._context = self._new_context(batch)
        self._open.clear()
        self._position = np.zeros(batch, np.int64)
        self._used_cells = np.zeros(batch, np.int64)

    def close(self) -> None:
        self._close_context()
        self._model.close()

    @property
    def _open(self) -> LlamaContext:
        if self._context is None:
            raise ValueError("the session is closed")
        return self._context

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None

    def _new_context(self, batch: int) -> LlamaContext:
        parameters = common_parameters(self.vocab_size, batch, self._threads, self._ubatch)
        parameters.n_ctx = 2 * (self._config.window + 1 + self._ubatch) * batch
        parameters.flash_attn_type = int(self._flash)
        parameters.type_k = parameters.type_v = TYPES[self._cache_type]
        if self._watch is not None:
            parameters.cb_eval = self._watch
        self._layout = StateLayout(self._config, self._cache_type, not self._flash, batch)
        flags = self._llama.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        return LlamaContext(
            self._model, self.vocab_size, batch, parameters, flags=flags, keep=self._watch
        )

    def get_rows(self, rows: range) -> State:
        """Returns a copy of the canonical state of some rows.

        llama.cpp's memory is then written from the copy, so that this session continues to the last
        bit like any other that gets the copy.
        """
        state = {s.name: np.zeros((len(rows), *s.shape), s.dtype) for s in self._specs}
        state[POSITION] = self._position[rows.start : rows.stop].copy()
        for index in np.flatnonzero(state[POSITION]).tolist():
            saved = unpack(self._open.save(rows[index]).tobytes(), self._layout)
            for name, array in saved.items():
                state[name][index] = array
        self._set_rows(rows, state)
        return state

    @property
    def _specs(self) -> list[StateSpec]:
        return [
            dataclasses.replace(spec, dtype="float32") if spec.name.endswith(".conv1d") else spec
            for spec in state_specs(self._config, self._cache_type)
        ]

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        calls = self._open.calls(tokens.shape[1], num_logits)
        logits = [self._decode(rows, tokens[:, part], count) for part, count in calls]
        return np.concatenate(logits, axis=1) if len(logits) > 1 else logits[0]

    def _decode(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        """Makes one call of llama.cpp, after freeing cells of its context if needed."""
        span, count = slice(rows.start, rows.stop), tokens.shape[1]
        if self._used_cells[span].max() + count > self._open.capacity:
            self.get_rows(rows)  # writes the states again
        logits = self._open.decode(rows, tokens, self._position[span], num_logits)
        self._position[span] += count
        self._used_cells[span] += count
        return logits

    def _set_rows(self, rows: range, state: State) -> None:
        self.require_unchanged()
        if (seen := int(state[POSITION].max(initial=0))) > LAST_POSITION:
            known = f"llama.cpp counts to {LAST_POSITION}"
            raise RequestError(f"the state has seen {seen} tokens; {known}")
        for index, sequence in enumerate(rows):
            self._open.forget(sequence)
            if state[POSITION][index]:
                one = {name: array[index] for name, array in state.items()}
                self._open.restore(sequence, np.frombuffer(pack(one, self._layout), np.uint8))
        self._position[rows.start : rows.stop] = state[POSITION]
        self._used_cells[rows.start : rows.stop] = 0


def require_batch(batch: int) -> None:
    most = library.bindings().llama_max_parallel_sequences()
    if not 1 <= batch <= most:
        raise RequestError(f"{batch} conversations at once; llama.cpp takes 1 to {most}")


def common_parameters(vocab_size: int, batch: int, threads: int, ubatch: int) -> Any:
    parameters = library.bindings().llama_context_default_params()
    tokens = max(ubatch, batch)
    rows = min(tokens, LOGITS_BYTES // (4 * vocab_size))
    parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = tokens, ubatch, batch
    parameters.n_outputs_max = max(rows, batch)
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.swa_full = parameters.kv_unified = False
    parameters.no_perf = True
    return parameters
