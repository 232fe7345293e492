"""Any model that llama.cpp loads, at growing depths, measured as `rgexport bench` measures ours.

    python -m bench.any_gguf reach FILE 0,2048,4096
    python -m bench.any_gguf time FILE 0,2048,4096

The first processes the tokens and keeps the states, the second prints the rows as JSON. llama-bench
would process all tokens anew for every depth. The settings are llama-bench's. A number after the
depths is the most tokens to process: the cost of a transformer's prompt grows with its square, so
that a depth beyond is reached by doubling the one before.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.processors import usable_processors
from rgexport.runtimes.bench.measure import MOST, BenchRequest, Measuring
from rgexport.runtimes.bench.roofline import roofline
from rgexport.runtimes.bench.rows import Row
from rgexport.runtimes.llama_cpp.library import Handle, bindings, complaint, load_model, version
from rgexport.runtimes.session import SessionInfo

STATES = Path("out/bench/states")
UBATCH = 512
TOKENS, REPETITIONS = 32, 3


class AnyGguf:
    """One conversation with a model in llama.cpp, whose state stays in llama.cpp's own form."""

    def __init__(self, path: Path, room: int, *, doubling: bool = False) -> None:
        """Loads a file, with room for `room` tokens; `doubling` lets `doubled` work."""
        self._llama = bindings()
        self._model = load_model(path)
        parameters = self._llama.llama_context_default_params()
        self._threads = usable_processors()
        settings = {"n_ctx": room, "n_ubatch": UBATCH, "swa_full": False, "no_perf": True}
        settings |= {"n_threads": self._threads, "n_threads_batch": self._threads}
        settings |= {"n_seq_max": 2, "kv_unified": True} if doubling else {}
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

    def doubled(self, state: State) -> State:
        """A transformer's state after twice as many tokens: the same ones once more, further on.

        A step at such a depth costs what it costs after as many other tokens.
        """
        half = int(state[POSITION][0])
        memory = self._llama.llama_get_memory(self._context.pointer)
        self.reset()
        for sequence in (0, 1):
            self._move(self._llama.llama_state_seq_set_data, state["sequence"], sequence)
        self._llama.llama_memory_seq_add(memory, 0, 0, -1, half)
        self._llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
        self._llama.llama_memory_seq_rm(memory, 1, -1, -1)
        self._position = 2 * half
        self.step(np.zeros(1, np.int64))  # turns the keys to where they are now
        self._llama.llama_memory_seq_rm(memory, 0, 2 * half, -1)
        self._position = 2 * half
        return self.get_state()

    def _move(self, function: Any, data: np.ndarray, sequence: int = 0) -> None:
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if function(self._context.pointer, pointer, data.size, sequence) != data.size:
            raise RequestError(f"llama.cpp cannot move its state: {complaint()}")


@dataclass
class KeptStates(Measuring):
    """Keeps the states at the depths in files: reaching one takes long, timing needs quiet."""

    processed: int = MOST
    """A depth beyond it is reached by doubling one."""

    def state_at(self, depth: int, state: State) -> State:
        """The state after `depth` tokens, from its file or from where `state` is."""
        file = STATES / self.artifact.stem / f"{depth}.npy"
        if not file.exists() or file.stat().st_mtime < self.artifact.stat().st_mtime:
            found = self._reached(depth, state)["sequence"]
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

    def rows(self) -> Iterator[Row]:
        """As any measuring; `doubled` says how such a depth came about."""
        for row in super().rows():
            yield replace(row, state="doubled") if row.depth > self.processed else row

    def _reached(self, depth: int, state: State) -> State:
        if depth <= self.processed:
            return super().state_at(depth, state)
        if depth != 2 * state[POSITION][0]:
            sys.exit(f"depth {depth} is not twice the one before, {state[POSITION][0]}")
        assert isinstance(self.session, AnyGguf)
        return self.session.doubled(state)


def main() -> None:
    """Reaches the depths, or prints the rows of one model."""
    verb, path, depths, *rest = sys.argv[1:]
    processed = int(rest[0]) if rest else MOST
    request = BenchRequest.parse("0", str(TOKENS), depths, repetitions=REPETITIONS)
    # The tokens that are timed, and those before for warming up, take room too.
    room = max(4096, *request.depths) + 1024
    doubling = verb == "reach" and max(request.depths) > processed
    began = time.perf_counter()
    session = AnyGguf(Path(path), room, doubling=doubling)
    took = time.perf_counter() - began
    with roofline(session.info.threads) as read_speed:
        measuring = KeptStates(session, request, read_speed, Path(path), took, processed=processed)
        if verb == "reach":
            measuring.reach()
        else:
            print(json.dumps([asdict(row) for row in measuring.rows()]))


if __name__ == "__main__":
    main()
