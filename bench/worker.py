"""A process that holds one open session, for measurements that take turns.

What runs in it stands still between two turns: idle engines spin for a while, and would slow down
whose turn it is.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.run import DEPTH
from rgexport.artifacts.opening import open_artifact
from rgexport.griffin.state import State
from rgexport.kernels.onnx.library import NO_NATIVE
from rgexport.runtimes.bench.measure import synthetic_state
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.machine import rss_bytes
from rgexport.runtimes.session import Session

WARM_UP_SECONDS = 3.0
"""Engines move their weights in the background."""


class Worker:
    """The process, as its parent sees it; a context manager that ends it."""

    def __init__(self, artifact: Path, *, native: bool) -> None:
        """Opens the artifact and waits until the session is warm."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", str(artifact)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {NO_NATIVE: "" if native else "1"},
        )
        self.facts = self._answer()
        """`kernels`, `engine`, `weight_bytes`, `state_bytes`, `load_seconds`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def measure(self, test: str, length: int) -> dict[str, Any]:
        """Times a prompt (`pp`), or single tokens after others (`tg`): returns `rate` and `rss`."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps([test, length]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a session ended: exit code {self._process.wait()}")
        self._process.send_signal(signal.SIGSTOP)
        return dict(json.loads(line))


def main() -> None:
    """Serves requests of the parent until it leaves."""
    artifact = open_artifact(Path(sys.argv[1]))
    began = time.perf_counter()
    session = open_session(artifact)
    took = time.perf_counter() - began
    info = session.info
    state = synthetic_state(session.get_state(), DEPTH, np.random.default_rng(0))
    while time.perf_counter() < began + took + WARM_UP_SECONDS:
        timed(session, state, "tg", 4)
    _say(
        kernels=info.kernels,
        engine=f"{info.engine} {info.engine_version}",
        weight_bytes=info.weight_bytes,
        state_bytes=info.state_bytes,
        load_seconds=took,
    )
    for line in sys.stdin:
        test, length = json.loads(line)
        _say(rate=length / timed(session, state, test, length), rss=rss_bytes())


def _say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def timed(session: Session, state: State, test: str, length: int) -> float:
    """Seconds for a prompt (`pp`) of random tokens, or for single ones that follow `state` (`tg`).

    One more token runs first, and is not counted.
    """
    tokens = np.random.default_rng(length).integers(0, session.vocab_size, (1, length))
    session.step(tokens[:, 0])
    if test == "pp":
        session.reset()
        began = time.perf_counter()
        session.prefill(tokens)
    else:
        session.set_state(state)
        began = time.perf_counter()
        for token in tokens[0]:
            session.step(token[None])
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
