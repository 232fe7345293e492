"""Core ML packages behind the Session interface: Core ML on macOS, an interpreter elsewhere."""

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import CoreMLManifest
from rgexport.export.coreml.package import PACKAGE
from rgexport.export.coreml.states import DECODE, PREFILL
from rgexport.export.manifest import ACTIVATIONS
from rgexport.griffin.state import POSITION, State
from rgexport.processors import usable_processors
from rgexport.runtimes.coreml.runner import Runner, open_runner
from rgexport.runtimes.coreml.states import Row, States
from rgexport.runtimes.sequences import checked_tokens, require_fitting
from rgexport.runtimes.session import SessionInfo
from rgexport.runtimes.unchanged_files import UnchangedFiles


class CoreMLSession:
    """A package with the functions `decode`, of one token, and `prefill`, of a fixed number.

    Both take one sequence, so the rows of a batch are run in turn, each with its own state.
    """

    def __init__(
        self, artifact: Artifact, *, threads: int | None = None, runner: Runner | None = None
    ):
        """Opens the package.

        Args:
            artifact: a Core ML artifact.
            threads: only reported: neither Core ML nor numpy's products can be told.
            runner: what executes it, instead of what this machine has.

        Raises:
            RequestError: the package cannot be executed here.
        """
        assert isinstance(artifact.manifest, CoreMLManifest)
        self._manifest = artifact.manifest
        self._threads = threads or usable_processors()
        self._files = UnchangedFiles(artifact, PACKAGE)
        self._runner = runner or open_runner(artifact)
        self._chunk = artifact.manifest.coreml.prefill_length
        self._vocab = artifact.manifest.config.vocab_size
        self._states = States(artifact.manifest, self._runner)
        self.reset()

    @property
    def info(self) -> SessionInfo:
        """What this session runs."""
        tensors = self._manifest.tensors.values()
        return SessionInfo(
            engine=self._runner.engine,
            engine_version=self._runner.version,
            threads=self._threads,
            activation_dtype=ACTIVATIONS[self._manifest.compute],
            weight_bytes=sum(p.nbytes for t in tensors for p in t.parts.values()),
            state_bytes=self._states.nbytes,
            prefill_chunk=self._chunk,
            chunk_logits=self._manifest.coreml.all_logits,
            whole_chunks=True,
        )

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        return self._vocab

    @property
    def position(self) -> np.ndarray:
        """Tokens seen so far, [B] int64."""
        return np.array([row.position for row in self._rows], np.int64)

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [B, T], T ≥ 1; returns the last `num_logits` logits, [B, n, vocab].

        Whole chunks go through `prefill`, what remains through `decode`; so do all tokens whose
        logits `prefill` does not give.
        """
        tokens = checked_tokens(tokens, len(self._rows), self._vocab)
        count = tokens.shape[1]
        first = count - max(1, min(num_logits, count))
        return np.stack(
            [self._take(row, ids, first) for row, ids in zip(self._rows, tokens, strict=True)]
        )

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Takes one token a row, [B]; returns its logits, [B, vocab]."""
        return self.prefill(np.reshape(tokens, (-1, 1)))[:, 0]

    def reset(self, batch: int = 1) -> None:
        """Forgets everything; from now on `batch` conversations.

        Raises:
            RequestError: a file changed under the session, and with it perhaps its weights.
        """
        self._files.require()
        self._rows = [Row(self._states) for _ in range(batch)]

    def get_state(self) -> State:
        """A copy of the canonical state."""
        rows = [self._states.canonical(row) for row in self._rows]
        state = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return state | {POSITION: self.position}

    def set_state(self, state: State) -> None:
        """Continues from a canonical state of any batch size.

        Raises:
            RequestError: a name or shape that does not fit this model.
        """
        require_fitting(state, self._states.shapes)
        self.reset(len(state[POSITION]))
        for index, row in enumerate(self._rows):
            row.position = int(state[POSITION][index])
            self._states.set(row, {name: state[name][index] for name in self._states.shapes})

    def close(self) -> None:
        """Lets go of the package and the states; the session cannot be used any more."""
        del self._rows, self._states, self._runner

    def _take(self, row: Row, ids: np.ndarray, first: int) -> np.ndarray:
        """Takes tokens [T] of one sequence; logits [T - first, vocab] of those from `first` on."""
        logits = np.empty((len(ids) - first, self._vocab), np.float32)
        start = 0
        while start < len(ids):
            whole = self._manifest.coreml.all_logits or start + self._chunk <= first + 1
            chunk = self._chunk if whole and start + self._chunk <= len(ids) else 1
            stop = start + chunk
            found = self._run(row, PREFILL if chunk > 1 else DECODE, ids[start:stop])
            wanted = stop - max(first, start)
            if wanted > 0:
                logits[stop - first - wanted : stop - first] = found[-wanted:]
            start = stop
        return logits

    def _run(self, row: Row, function: str, ids: np.ndarray) -> np.ndarray:
        """One call on tokens [T]; the logits that it gives, [1 or T, vocab]."""
        positions = np.arange(row.position, row.position + len(ids), dtype=np.int32)
        inputs = {"input_ids": ids[None].astype(np.int32), "position_ids": positions[None]}
        outputs = self._runner.predict(function, inputs | row.carried, row.state)
        row.carried = {
            source: outputs[target] for source, target in self._states.carried_names.items()
        }
        row.position += len(ids)
        return outputs["logits"][0]
