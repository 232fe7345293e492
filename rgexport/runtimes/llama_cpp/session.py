"""llama.cpp behind the Session interface: the sequences of one context are the batch."""

import dataclasses
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.gguf.naming import ARCHITECTURE
from rgexport.griffin.state import POSITION, State, StateSpec, state_specs
from rgexport.parallelism import usable_threads
from rgexport.runtimes.llama_cpp.context import Context, Settings, require_batch
from rgexport.runtimes.llama_cpp.library import bindings, load_model, version
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.runtimes.unchanged_files import UnchangedFiles

UBATCH = 512
"""Most tokens that go through the layers at once; llama.cpp's own default."""
LAST_POSITION = 2**31 - 1
"""llama.cpp counts positions in 32 bits."""

_WINDOW = f"{ARCHITECTURE}.attention.sliding_window"
"""The key of the window, the token itself included."""
_ALL_F32, _FLOATS = 0, (0, 1, 32)
"""`LLAMA_FTYPE_ALL_F32`; that, `MOSTLY_F16` and `MOSTLY_BF16` (llama.h)."""


class LlamaCppSession(Session):
    """A .gguf file in the llama.cpp of the installed llama-cpp-python.

    Keys and values are float32 if all weights are, otherwise float16, whose rounding (1e-4 of the
    logits) is small beside that of the weights. Flash attention, which saves a third of the
    attention's time in a step, is used if weights are quantized: on a CPU it rounds queries too
    and sums in float16 (2e-3 of the logits after a full window).
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
        window: int | None = None,
        watch: Any = None,
    ):
        """Loads the model.

        Args:
            artifact: a GGUF file.
            threads: the processors that this process may use, by default.
            ubatch: most tokens that go through the layers at once.
            flash_attention: whether attention is one fused operation; by default see above.
            cache_type: `float32` or `float16` for keys and values; by default see above.
            mmap: whether weights stay in the file's pages, where llama.cpp can use them so.
            window: of attention; that of the file, by default, which is the most it can be. With 0,
                a token sees only itself.
            watch: see `Settings`.

        Raises:
            RequestError: there is no llama-cpp-python that knows RecurrentGemma, or it cannot load
                the file.
        """
        self._llama = bindings()
        self._config = artifact.manifest.config
        self._opened_files = (UnchangedFiles(artifact),)
        changed = {}
        if window is not None:
            changed = {_WINDOW: window + 1}
            # The state keeps one key where the window is 0: no later token sees it.
            self._config = dataclasses.replace(self._config, window=max(1, window))
        self._model = load_model(artifact.path, mmap=mmap, metadata=changed)
        self._require_vocabulary(artifact)
        stored = self._llama.llama_model_ftype(self._model.pointer)
        self._settings = Settings(
            threads=usable_threads(threads),
            ubatch=ubatch,
            flash_attention=stored not in _FLOATS if flash_attention is None else flash_attention,
            cache_type=cache_type or ("float32" if stored == _ALL_F32 else "float16"),
            watch=watch,
        )
        self._context: Context | None = None
        self.reset()

    @property
    def info(self) -> SessionInfo:
        """What this session runs."""
        sizes = (np.prod(s.shape) * np.dtype(s.dtype).itemsize for s in self._specs)
        return SessionInfo(
            engine="llama.cpp",
            engine_version=version(),
            threads=self._settings.threads,
            activation_dtype="float32",
            weight_bytes=self._llama.llama_model_size(self._model.pointer),
            state_bytes=int(sum(sizes)),
            prefill_chunk=self._settings.ubatch,
        )

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        return self._config.vocab_size

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of each state."""
        return {spec.name: spec.shape for spec in self._specs}

    @property
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""
        return self._position.copy()

    def reset(self, batch: int = 1) -> None:
        """Clears the state, and sets the number of conversations.

        Raises:
            RequestError: too many for llama.cpp, or too little memory; or the file has changed, and
                perhaps the session's weights with it.
        """
        self.require_unchanged()
        require_batch(batch)  # before the context that is there is closed
        if self._context is None or self._context.batch != batch:
            self._close_context()
            self._context = Context(self._model, self._config, self._settings, batch)
        self._open.clear()
        self._position = np.zeros(batch, np.int64)
        self._counted = np.zeros(batch, np.int64)

    def get_rows(self, rows: range) -> State:
        """A copy of the canonical state of some rows.

        llama.cpp's own memory is then written from the copy, so that this session continues to the
        last bit like any other session that gets the copy.
        """
        state = {s.name: np.zeros((len(rows), *s.shape), s.dtype) for s in self._specs}
        state[POSITION] = self._position[rows.start : rows.stop].copy()
        for place in np.flatnonzero(state[POSITION]).tolist():
            for name, array in self._open.read(rows[place]).items():
                state[name][place] = array
        self._set_rows(rows, state)
        return state

    def close(self) -> None:
        """Frees the context and the model; the session cannot be used any more."""
        self._close_context()
        self._model.close()

    @property
    def _specs(self) -> list[StateSpec]:
        """The states as llama.cpp keeps them."""
        return [
            dataclasses.replace(spec, dtype="float32") if spec.name.endswith(".conv1d") else spec
            for spec in state_specs(self._config, self._settings.cache_type)
        ]

    @property
    def _open(self) -> Context:
        if self._context is None:
            raise ValueError("the session is closed")
        return self._context

    def _close_context(self) -> None:
        if self._context is not None:
            self._context.close()
        self._context = None

    def _require_vocabulary(self, artifact: Artifact) -> None:
        vocabulary = self._llama.llama_model_get_vocab(self._model.pointer)
        found = self._llama.llama_vocab_n_tokens(vocabulary)
        if found != self._config.vocab_size:
            raise RequestError(
                f"{artifact.path} is damaged: its vocabulary has {found} tokens, its manifest "
                f"says {self._config.vocab_size}; export it again"
            )

    def _take(self, rows: range, tokens: np.ndarray, num_logits: int) -> np.ndarray:
        calls = self._open.calls(tokens.shape[1], num_logits)
        logits = [self._decode(rows, tokens[:, part], wanted) for part, wanted in calls]
        return np.concatenate(logits, axis=1) if len(logits) > 1 else logits[0]

    def _decode(self, rows: range, tokens: np.ndarray, wanted: int) -> np.ndarray:
        """One call of llama.cpp, after making room in its context if needed."""
        place, count = slice(rows.start, rows.stop), tokens.shape[1]
        if self._counted[place].max() + count > self._open.room:
            self.get_rows(rows)  # writes the states again, which makes room
        logits = self._open.decode(rows, tokens, self._position[place], wanted)
        self._position[place] += count
        self._counted[place] += count
        return logits

    def _set_rows(self, rows: range, state: State) -> None:
        self.require_unchanged()
        furthest = int(state[POSITION].max(initial=0))
        if furthest > LAST_POSITION:
            raise RequestError(
                f"the state has seen {furthest} tokens; llama.cpp counts to {LAST_POSITION}"
            )
        for place, sequence in enumerate(rows):
            self._open.forget(sequence)
            if state[POSITION][place]:
                self._open.write(sequence, {name: array[place] for name, array in state.items()})
        self._position[rows.start : rows.stop] = state[POSITION]
        self._counted[rows.start : rows.stop] = 0
