"""Several conversations, or several tokens of one, in one pass over the weights: times one token's.

    python -m bench.rows [ARTIFACT …] [--rows 1,2,4,8,16]

Without an artifact, the random 2B of `bench.onnx` in each storage. Every pass starts with a full
window; the counts take turns. `RGEXPORT_CPU` chooses the kernels.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from bench.onnx_models import STORAGES, make_missing
from bench.run import DEPTH
from rgexport.artifacts.opening import open_artifact
from rgexport.progress import note
from rgexport.runtimes.bench.measure import synthetic_state
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.machine import environment
from rgexport.runtimes.session import Session

PASSES = 3
"""Of each count in a round; the first one is not counted."""


def main() -> None:
    """Prints a table, with two lines for each artifact."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", type=Path, nargs="*")
    parser.add_argument("--rows", default="1,2,4,8,16", help="beginning with 1")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    counts = [int(word) for word in asked.rows.split(",")]
    if not asked.artifacts:
        make_missing(list(STORAGES.values()), transformer=False)
    facts = environment()
    print(f"{facts['cpu']}, {facts['cores']} cores\n")
    print(f"| | {' | '.join(map(str, counts))} |\n|---|{'---|' * len(counts)}")
    for path in asked.artifacts or [storage.artifact for storage in STORAGES.values()]:
        session = open_session(open_artifact(path))
        name = f"{path.name}, {session.info.title}"
        for kind, axis in (("conversations", 0), ("tokens", 1)):
            times = passes(session, counts, axis, asked.rounds)
            cells = [f"{1e3 * t:.0f} ms ({t / times[0]:.2f})" for t in times]
            print(f"| {name}, {kind} | {' | '.join(cells)} |", flush=True)
        session.close()


def passes(session: Session, counts: list[int], axis: int, rounds: int) -> list[float]:
    """Median seconds of a pass over so many conversations (axis 0) or tokens of one (axis 1)."""
    generator = np.random.default_rng(0)
    session.reset(1)
    state = synthetic_state(session.get_state(), DEPTH, generator)
    times: dict[int, list[float]] = {count: [] for count in counts}
    for index in range(rounds):
        note(f"round {index + 1} of {rounds}")
        for count in counts:
            batch = count if axis == 0 else 1
            session.reset(batch)
            session.set_state({name: np.repeat(array, batch, 0) for name, array in state.items()})
            shape = (batch, 1 if axis == 0 else count)
            for turn in range(PASSES):
                tokens = generator.integers(0, session.vocab_size, shape)
                began = time.perf_counter()
                session.prefill(tokens)
                if turn:
                    times[count].append(time.perf_counter() - began)
    return [median(times[count]) for count in counts]


if __name__ == "__main__":
    main()
