"""Any model that llama.cpp loads, at growing depths, measured as `rgexport bench` measures ours.

    python -m bench.any_gguf reach FILE 0,2048,4096
    python -m bench.any_gguf time FILE 0,2048,4096

The first processes the tokens and keeps the states, the second prints the rows as JSON. llama-bench
would process all tokens anew for every depth. The settings are llama-bench's. A number after the
depths is the most tokens to process: the cost of a transformer's prompt grows with its square, so
that a depth beyond is reached by doubling the one before.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from bench.any_model import DATA, SIZES, AnyModelSession
from rgexport.griffin.state import POSITION, State
from rgexport.runtimes.bench.measure import BenchMeasurement, BenchRow
from rgexport.runtimes.bench.request import MOST, BenchRequest
from rgexport.runtimes.bench.roofline import roofline

STATES = Path("out/bench/states")
TOKENS, REPETITIONS = 32, 3


class AnyGguf(AnyModelSession):
    """One conversation with room for `room` tokens; `doubling` lets `doubled` work."""

    def __init__(self, path: Path, room: int, *, doubling: bool = False) -> None:
        """Loads a file."""
        both = {"n_seq_max": 2} if doubling else {}
        super().__init__(path, capacity=room, **both)

    def doubled(self, state: State) -> State:
        """A transformer's state after twice as many tokens: the same ones once more, further on.

        A step at such a depth costs what it costs after as many other tokens.
        """
        half = int(state[POSITION][0])
        self.reset()
        llama, memory = self._llama, self._open.memory
        for sequence in (0, 1):
            self._open.restore(sequence, state[DATA][0])
        llama.llama_memory_seq_add(memory, 0, 0, -1, half)
        llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
        llama.llama_memory_seq_rm(memory, 1, -1, -1)
        self._position[0] = 2 * half
        self.step(np.zeros(1, np.int64))  # turns the keys to where they are now
        llama.llama_memory_seq_rm(memory, 0, 2 * half, -1)
        self._position[0] = 2 * half
        return self.get_state()


@dataclass
class KeptStates(BenchMeasurement):
    """Keeps the states at the depths in files: reaching one takes long, timing needs quiet."""

    processed: int = MOST
    """A depth beyond it is reached by doubling one."""

    def state_at(self, depth: int, state: State) -> State:
        """The state after `depth` tokens, from its file or from where `state` is."""
        file = STATES / self.artifact.stem / f"{depth}.npy"
        if not file.exists() or file.stat().st_mtime < self.artifact.stat().st_mtime:
            found = self._reached(depth, state)[DATA][0]
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, found)
            os.replace(partial, file)
        found = np.load(file)
        return {POSITION: np.array([depth]), DATA: found[None], SIZES: np.array([len(found)])}

    def reach(self) -> None:
        """Makes the files that are missing."""
        state = self.session.get_state()
        for depth in sorted(self.request.depths):
            state = self.state_at(depth, state)

    def rows(self) -> Iterator[BenchRow]:
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
