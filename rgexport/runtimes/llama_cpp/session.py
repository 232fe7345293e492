"""llama.cpp behind the Session interface: the sequences of one context are the batch."""

import dataclasses
from abc import abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.gguf.naming import ARCHITECTURE
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.parallelism import usable_threads
from rgexport.runtimes.llama_cpp.context import (
    ContextSettings,
    GriffinContext,
    LlamaContext,
    require_batch,
)
from rgexport.runtimes.llama_cpp.library import bindings, load_model, version
from rgexport.runtimes.session import Session, SessionInfo, UnchangedFiles

UBATCH = 512
"""Most tokens that go through the layers at once; llama.cpp's own default."""
LAST_POSITION = 2**31 - 1
"""llama.cpp counts positions in 32 bits."""

_WINDOW = f"{ARCHITECTURE}.attention.sliding_window"
"""The key of the window, the token itself included."""
_ALL_F32, _FLOATS = 0, (0, 1, 32)
"""`LLAMA_FTYPE_ALL_F32`; that, `MOSTLY_F16` and `MOSTLY_BF16` (llama.h)."""

_Context = TypeVar("_Context", bound=LlamaContext)


class LlamaSession(Session, Generic[_Context]):
    """A model of llama.cpp and the context that its rows share."""

    _position: np.ndarray

    def __init__(self, path: Path, threads: int | None, **options: Any) -> None:
        self._llama = bindings()
        self._threads = usable_threads(threads)
        self._model = load_model(path, **options)
        vocabulary = self._llama.llama_model_get_vocab(self._model.pointer)
        self.vocab_size = int(self._llama.llama_vocab_n_tokens(vocabulary))
        self._context: _Context | None = None
        self._ubatch = UBATCH

    @property
    def info(self) -> SessionInfo:
        return SessionInfo(
            engine="llama.cpp",
            engine_version=version(),
            threads=self._threads,
            activation_dtype="float32",
            weight_bytes=self._llama.llama_model_size(self._model.pointer),
            state_bytes=self._state_bytes,
            prefill_chunk=self._ubatch,
        )

    @property
    @abstractmethod
    def _state_bytes(self) -> int: ...

    @property
    def position(self) -> np.ndarray:
        return self._position.copy()

    def close(self) -> None:
        self._close_context()
        self._model.close()

    @property
    def _open(self) -> _Context:
        if self._context is None:
            raise ValueError("the session is closed")
        return self._context

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        calls = self._open.calls(tokens.shape[1], num_logits)
        logits = [self._decode(rows, tokens[:, part], count) for part, count in calls]
        return np.concatenate(logits, axis=1) if len(logits) > 1 else logits[0]

    @abstractmethod
    def _decode(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        """Makes one call of llama.cpp, after making space in its context if needed."""


class LlamaCppSession(LlamaSession[GriffinContext]):
    """A .gguf file in the llama.cpp of the installed llama-cpp-python.

    Keys and values are float32 if all weights are, otherwise float16, whose rounding (1e-4 of the
    logits) is small beside that of the weights. Flash attention, which saves a third of the
    attention's time in a step, is used if weights are quantized: on a CPU it rounds queries too and
    sums in float16 (2e-3 of the logits after a full window).
    """

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
        metadata = {}
        if window is not None:
            metadata = {_WINDOW: window + 1}
            # The state keeps one key where the window is 0: no later token sees it.
            self._config = dataclasses.replace(self._config, window=max(1, window))
        super().__init__(artifact.path, threads, mmap=mmap, metadata=metadata)
        if self.vocab_size != self._config.vocab_size:
            raise RequestError(
                f"{artifact.path} is damaged: its vocabulary has {self.vocab_size} tokens, its "
                f"manifest says {self._config.vocab_size}; export it again"
            )
        stored = self._llama.llama_model_ftype(self._model.pointer)
        self._ubatch = ubatch
        self._settings = ContextSettings(
            threads=self._threads,
            ubatch=ubatch,
            flash_attention=stored not in _FLOATS if flash_attention is None else flash_attention,
            cache_type="float32" if stored == _ALL_F32 else "float16",
            watch=watch,
        )
        self.reset()

    @property
    def _state_bytes(self) -> int:
        return int(sum(np.prod(s.shape) * np.dtype(s.dtype).itemsize for s in self._specs))

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {spec.name: spec.shape for spec in self._specs}

    def reset(self, batch: int = 1) -> None:
        self.require_unchanged()
        require_batch(batch)  # before the present context is closed
        if self._context is None or self._context.batch != batch:
            self._close_context()
            self._context = GriffinContext(self._model, self._config, self._settings, batch)
        self._open.clear()
        self._position = np.zeros(batch, np.int64)
        self._used_cells = np.zeros(batch, np.int64)

    def get_rows(self, rows: range) -> State:
        """Returns a copy of the canonical state of some rows.

        llama.cpp's memory is then written from the copy, so that this session continues to the last
        bit like any other that gets the copy.
        """
        state = {s.name: np.zeros((len(rows), *s.shape), s.dtype) for s in self._specs}
        state[POSITION] = self._position[rows.start : rows.stop].copy()
        for index in np.flatnonzero(state[POSITION]).tolist():
            for name, array in self._open.read(rows[index]).items():
                state[name][index] = array
        self._set_rows(rows, state)
        return state

    @property
    def _specs(self) -> list[StateSpec]:
        return [
            dataclasses.replace(spec, dtype="float32") if spec.name.endswith(".conv1d") else spec
            for spec in state_specs(self._config, self._settings.cache_type)
        ]

    def _decode(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        span, count = slice(rows.start, rows.stop), tokens.shape[1]
        if self._used_cells[span].max() + count > self._open.capacity:
            self.get_rows(rows)  # writes the states again, which frees cells
        logits = self._open.decode(rows, tokens, self._position[span], num_logits)
        self._position[span] += count
        self._used_cells[span] += count
        return logits

    def _set_rows(self, rows: range, state: State) -> None:
        self.require_unchanged()
        furthest = int(state[POSITION].max(initial=0))
        if furthest > LAST_POSITION:
            raise RequestError(
                f"the state has seen {furthest} tokens; llama.cpp counts to {LAST_POSITION}"
            )
        for index, sequence in enumerate(rows):
            self._open.forget(sequence)
            if state[POSITION][index]:
                self._open.write(sequence, {name: array[index] for name, array in state.items()})
        self._position[rows.start : rows.stop] = state[POSITION]
        self._used_cells[rows.start : rows.stop] = 0
