"""A llama.cpp context of several sequences: tokens in, logits out, states in and out."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.state import State
from rgexport.runtimes.llama_cpp.library import Handle, bindings, complaint, logged
from rgexport.runtimes.llama_cpp.state import TYPES, StateLayout, pack, unpack

LOGITS_BYTES = 64 << 20
"""Most logits of one call: llama.cpp reserves memory for as many as a call may ask for."""


@dataclass(frozen=True)
class ContextSettings:
    """Settings of a context; `watch` is a `ggml_backend_sched_eval_callback`."""

    threads: int
    ubatch: int
    flash_attention: bool
    cache_type: str
    watch: Any = None


class LlamaContext:
    """The memory of `batch` sequences in llama.cpp; it keeps its model alive.

    Attributes:
        capacity: tokens that a sequence can take.
        chunk: most tokens of one sequence in one call.
        rows: most logits of one sequence in one call.
    """

    _flags = 0

    def __init__(
        self, model: Handle, vocab_size: int, batch: int, parameters: Any, keep: Any = None
    ) -> None:
        self._llama = bindings()
        require_batch(batch)
        with logged():
            pointer = self._llama.llama_init_from_model(model.pointer, parameters)
            self._handle = Handle(pointer, self._llama.llama_free, keep=(model, keep))
        if not pointer:
            raise RequestError(f"llama.cpp cannot run this model: {complaint()}")
        self.pointer = pointer
        self.memory = self._llama.llama_get_memory(pointer)
        self._vocab_size = vocab_size
        self._sequence_ids, self.batch = np.arange(batch, dtype=np.int32), batch
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
        with logged():
            batch = self._batch(sequences, tokens, positions, num_logits)
            status = self._llama.llama_decode(self.pointer, batch)
        if status != 0:
            raise RequestError(f"llama.cpp stopped with status {status}: {complaint()}")
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
        size: int = self._llama.llama_state_seq_get_size_ext(self.pointer, sequence, self._flags)
        return size

    def save(self, sequence: int) -> np.ndarray:
        """Returns the state of a sequence that has seen a token, in llama.cpp's form, uint8 [N]."""
        data = np.empty(self.saved_bytes(sequence), np.uint8)
        if not self._transfer(self._llama.llama_state_seq_get_data_ext, data, sequence):
            raise RequestError(f"llama.cpp cannot save its state: {complaint()}")
        return data

    def restore(self, sequence: int, data: np.ndarray) -> None:
        """Sets an empty sequence to a result of `save`."""
        if not self._transfer(self._llama.llama_state_seq_set_data_ext, data, sequence):
            raise RequestError(f"llama.cpp cannot restore the state: {complaint()}")

    def close(self) -> None:
        self._handle.close()

    def _transfer(self, function: Any, data: np.ndarray, sequence: int) -> bool:
        address = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        with logged():
            size = function(self.pointer, address, data.size, sequence, self._flags)
        return bool(size == data.size > 0)

    def _batch(
        self, sequences: range, tokens: np.ndarray, positions: np.ndarray, num_logits: int
    ) -> Any:
        """Makes a batch, sequence after sequence, that keeps its arrays alive."""
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


class GriffinContext(LlamaContext):
    """The memory of sequences of a Griffin model.

    Beside the cache of the window, llama.cpp keeps one for layers without a window. There are no
    such layers, but every token takes a cell of it, so only this cache can become full, after
    `capacity` tokens. A saved state does not include it: `write` frees all of its cells.
    """

    def __init__(
        self, model: Handle, config: GriffinConfig, settings: ContextSettings, batch: int
    ) -> None:
        parameters = common_parameters(config.vocab_size, batch, settings.threads, settings.ubatch)
        parameters.n_ctx = 2 * (config.window + 1 + settings.ubatch) * batch
        parameters.flash_attn_type = int(settings.flash_attention)
        parameters.type_k = parameters.type_v = TYPES[settings.cache_type]
        if settings.watch is not None:
            parameters.cb_eval = settings.watch
        super().__init__(model, config.vocab_size, batch, parameters, keep=settings)
        self._flags = self._llama.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        self._layout = StateLayout(config, settings.cache_type, not settings.flash_attention, batch)

    def read(self, sequence: int) -> State:
        """Returns the canonical state, without a batch axis, of a sequence with a token."""
        return unpack(self.save(sequence).tobytes(), self._layout)

    def write(self, sequence: int, state: State) -> None:
        """Sets an empty sequence to a state as `read` returns it."""
        self.restore(sequence, np.frombuffer(pack(state, self._layout), np.uint8))


def require_batch(batch: int) -> None:
    most = bindings().llama_max_parallel_sequences()
    if not 1 <= batch <= most:
        raise RequestError(f"{batch} conversations at once; llama.cpp takes 1 to {most}")


def common_parameters(vocab_size: int, batch: int, threads: int, ubatch: int) -> Any:
    """Returns the parameters that all contexts share; the others keep llama.cpp's defaults."""
    parameters = bindings().llama_context_default_params()
    tokens = max(ubatch, batch)
    rows = min(tokens, LOGITS_BYTES // (4 * vocab_size))
    parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = tokens, ubatch, batch
    parameters.n_outputs_max = max(rows, batch)
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.swa_full = parameters.kv_unified = False
    parameters.no_perf = True
    return parameters
