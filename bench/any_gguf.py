"""Any model that llama.cpp loads, at growing depths, measured as `rgexport bench` measures ours.

    python -m bench.any_gguf reach FILE 0,2048,4096
    python -m bench.any_gguf time FILE 0,2048,4096

The first processes the tokens and keeps the states, the second prints the rows as JSON. llama-bench
would process all tokens anew for every depth. The settings are llama-bench's.
"""

import ctypes
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.bench import BenchRequest, Measuring
from rgexport.runtimes.llama_cpp_library import Handle, bindings, complaint, load_model, version
from rgexport.runtimes.roofline import roofline
from rgexport.runtimes.sequences import usable_processors
from rgexport.runtimes.session import SessionInfo

STATES = Path("out/bench/states")
UBATCH = 512
TOKENS, REPETITIONS = 32, 3


class AnyGguf:
    """One conversation with a model in llama.cpp, whose state stays in llama.cpp's own form."""

    def __init__(self, path: Path, room: int) -> None:
        """Loads a file, with room for `room` tokens."""
        self._llama = bindings()
        self._model = load_model(path)
        parameters = self._llama.llama_context_default_params()
        self._threads = usable_processors()
        settings = {"n_ctx": room, "n_ubatch": UBATCH, "swa_full": False, "no_perf": True}
        settings |= {"n_threads": self._threads, "n_threads_batch": self._threads}
        for name, value in settings.items():
            setattr(parameters, name, value)
        pointer = self._llama.llama_init_from_model(self._model.pointer, parameters)
        if not pointer:
            raise RequestError(f"llama.cpp cannot run {path}: {complaint()}")
        self._context = Handle(pointer, self._llama.llama_free, keep=self._model)
        vocabulary = self._llama.llama_model_get_vocab(self._model.pointer)
        self.vocab_size = self._llama.llama_vocab_n_tokens(vocabulary)
        self._position = 0

    @property
    def info(self) -> SessionInfo:
        """What this session runs."""
        size = self._llama.llama_model_size(self._model.pointer)
        state = self._llama.llama_state_seq_get_size(self._context.pointer, 0)
        return SessionInfo("llama.cpp", version(), self._threads, "float32", size, state, UBATCH)

    @property
    def position(self) -> np.ndarray:
        """Tokens seen so far, [1] int64."""
        return np.array([self._position])

    def prefill(self, tokens: np.ndarray, num_logits: int = 1) -> np.ndarray:
        """Takes tokens [1, T], T at most 2,048; returns the last one's logits, [1, 1, vocab]."""
        ids = (ctypes.c_int32 * tokens.size)(*tokens.ravel().tolist())
        batch = self._llama.llama_batch_get_one(ids, tokens.size)
        if self._llama.llama_decode(self._context.pointer, batch) != 0:
            raise RequestError(f"llama.cpp stopped: {complaint()}")
        self._position += tokens.size
        logits = self._llama.llama_get_logits_ith(self._context.pointer, -1)
        return np.ctypeslib.as_array(logits, (1, 1, self.vocab_size)).copy()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Takes one token, [1]; returns its logits, [1, vocab]."""
        return self.prefill(tokens[None])[0]

    def reset(self, batch: int = 1) -> None:
        """Forgets everything."""
        assert batch == 1
        memory = self._llama.llama_get_memory(self._context.pointer)
        self._llama.llama_memory_clear(memory, True)
        self._position = 0

    def get_state(self) -> State:
        """The position, and what llama.cpp writes of the sequence."""
        size = self._llama.llama_state_seq_get_size(self._context.pointer, 0)
        data = np.empty(size, np.uint8)
        self._move(self._llama.llama_state_seq_get_data, data)
        return {POSITION: self.position, "sequence": data}

    def set_state(self, state: State) -> None:
        """Continues from what `get_state` gave."""
        self.reset()
        self._position = int(state[POSITION][0])
        if self._position:
            self._move(self._llama.llama_state_seq_set_data, state["sequence"])

    def _move(self, function: Any, data: np.ndarray) -> None:
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if function(self._context.pointer, pointer, data.size, 0) != data.size:
            raise RequestError(f"llama.cpp cannot move its state: {complaint()}")


@dataclass
class KeptStates(Measuring):
    """Keeps the states at the depths in files: reaching one takes long, timing needs quiet."""

    def state_at(self, depth: int, state: State) -> State:
        """The state after `depth` tokens, from its file or from where `state` is."""
        file = STATES / self.artifact.stem / f"{depth}.npy"
        if not file.exists() or file.stat().st_mtime < self.artifact.stat().st_mtime:
            found = super().state_at(depth, state)["sequence"]
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, found)
            os.replace(partial, file)
        return {POSITION: np.array([depth]), "sequence": np.load(file)}

    def reach(self) -> None:
        """Makes the files that are missing."""
        state = self.session.get_state()
        for depth in sorted(self.request.depths):
            state = self.state_at(depth, state)


def main() -> None:
    """Reaches the depths, or prints the rows of one model."""
    verb, path, depths = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    request = BenchRequest.parse("0", str(TOKENS), depths, repetitions=REPETITIONS)
    # The tokens that are timed, and those before for warming up, take room too.
    room = max(4096, *request.depths) + 1024
    began = time.perf_counter()
    session = AnyGguf(path, room)
    took = time.perf_counter() - began
    with roofline(session.info.threads) as read_speed:
        measuring = KeptStates(session, request, read_speed, path, took)
        if verb == "reach":
            measuring.reach()
        else:
            print(json.dumps([asdict(row) for row in measuring.rows()]))


if __name__ == "__main__":
    main()
