"""Measures an artifact's speed: prompts and tokens, at depths, beside the memory's read speed.

The tests are llama-bench's. The machine's read speed drifts within minutes, so tests at all depths
take turns, and the memory is read between the timed pieces.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.opening import open_artifact
from rgexport.griffin.state import POSITION, State
from rgexport.progress import note, task
from rgexport.runtimes.bench.request import BenchRequest, BenchTest
from rgexport.runtimes.bench.roofline import ReadSpeed, roofline, seconds
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.machine import cpu, peak_rss_bytes, rss_bytes
from rgexport.runtimes.session import Session

PIECE = 512
"""Tokens per prefill, on the way to a depth and for warming up."""
WARM_UP_SECONDS = 4.0
"""Longer than the background work of an engine, which moves weights to huge pages for about 2 s."""
SLICE_SECONDS = 1.0
"""About how long steps run between two readings of the memory."""
PATIENCE_MINUTES = 1.0
"""If a depth takes longer to reach, a note names --synthetic."""


@dataclass(frozen=True)
class BenchRow:
    """A test at a depth; the output has the fields in this order.

    Attributes:
        state: how the depth was reached: by `processed` tokens, or with a `synthetic` state.
        deviation: the standard deviation over the repetitions; 0 for one.
        time_ratio: the median time of a token, relative to the same test at the lowest depth.
        bytes_per_token: weights read per token; they are read once for each chunk of a prompt.
        roofline_bytes_per_second: the median of the memory's read speed between the timed pieces.
        roofline_share: tokens_per_second * bytes_per_token / roofline_bytes_per_second.
        rss_bytes: memory of the process at the end of a repetition: the median.
        peak_rss_bytes: the most memory of the process so far, opening included.
    """

    test: str
    depth: int
    state: str
    repetitions: int
    tokens_per_second: float
    deviation: float
    median_tokens_per_second: float
    time_ratio: float
    bytes_per_token: float
    roofline_bytes_per_second: float
    roofline_share: float
    rss_bytes: int | None
    peak_rss_bytes: int | None
    load_seconds: float
    artifact_bytes: int
    artifact: str
    engine: str
    engine_version: str
    kernels: str
    threads: int
    cpu: str


def bench_artifact(
    path: Path | str,
    request: BenchRequest,
    *,
    threads: int | None = None,
    allow_foreign: bool = False,
) -> list[BenchRow]:
    """Opens an artifact in a session and measures it; returns a row for each test and depth.

    Raises RequestError if the artifact cannot be opened, or the machine has too little memory.
    """
    artifact = open_artifact(path, allow_foreign=allow_foreign)
    start = time.perf_counter()
    session = open_session(artifact, threads=threads)
    load_seconds = time.perf_counter() - start
    try:
        with roofline(session.info.threads) as read_speed:
            measurement = BenchMeasurement(session, request, read_speed, artifact, load_seconds)
            return list(measurement.rows())
    finally:
        session.close()


@dataclass
class _Cell:
    """The measured values of a test at a depth.

    Attributes:
        state_file: the state at the depth, from which each repetition starts.
        rates: tokens per second of each repetition.
        speeds: the memory's read speed before, between and after the timed pieces.
        memory: bytes of the process at the end of each repetition, where they are known.
        peak: the most bytes of the process so far.
    """

    test: BenchTest
    depth: int
    state_file: Path
    rates: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    peak: int | None = None


@dataclass
class BenchMeasurement:
    """Measures a session with one conversation of random tokens, as llama-bench does."""

    session: Session
    request: BenchRequest
    read_speed: ReadSpeed
    artifact: Artifact
    load_seconds: float
    _generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def rows(self) -> Iterator[BenchRow]:
        """Measures everything, then yields the rows: depths in rising order, tests within each."""
        self._warm_up()
        with TemporaryDirectory(prefix="rgexport-bench-") as folder:
            cells = self._cells(Path(folder))
            self._measure(cells)

        lowest: dict[BenchTest, _Cell] = {}
        for cell in cells:
            lowest.setdefault(cell.test, cell)
            yield self._row(cell, lowest[cell.test])

    def _warm_up(self) -> None:
        """Takes single steps until the background work of the engine is over."""
        end = time.perf_counter() + WARM_UP_SECONDS
        with task("Warming up", leaves_line=False):
            while time.perf_counter() < end:
                if self.session.position[0] >= PIECE:
                    self.session.reset()
                self.session.step(self._random_tokens(1)[0])

    def _cells(self, folder: Path) -> list[_Cell]:
        """Reaches the depths, and returns an empty cell for each test at each of them.

        The states are kept in files, as they would count in the memory of the process.
        """
        self.session.reset()
        state = self.session.get_state()
        cells = []
        for depth in sorted(set(self.request.depths)):
            state = self.state_at(depth, state)
            state_file = folder / f"{depth}.npz"
            np.savez(state_file, **state)  # type: ignore[arg-type]  # none is named `allow_pickle`
            cells += [_Cell(test, depth, state_file) for test in self.request.tests]
        return cells

    def _measure(self, cells: list[_Cell]) -> None:
        """Fills the cells: in each round, every cell has one repetition."""
        rounds = self.request.repetitions
        with task("Measuring", len(cells) * (rounds + 1), "repetitions") as advance:
            for cell in cells:
                self._run_briefly(cell)
                advance(1)

            speed = self.read_speed()
            for _ in range(rounds):
                for cell in cells:
                    cell.speeds.append(speed)
                    self._repeat(cell)
                    speed = self.read_speed()
                    cell.speeds.append(speed)
                    advance(1)

    def _run_briefly(self, cell: _Cell) -> None:
        """Runs a test once without measuring it, so that the engine allocates its memory."""
        length = 1
        if cell.test.kind == "pp":
            length = min(cell.test.length, PIECE)
        self._run(cell, length, speeds=[])

    def _repeat(self, cell: _Cell) -> None:
        """Runs a test once and adds its rate and memory to the cell."""
        elapsed = self._run(cell, cell.test.length, cell.speeds)
        cell.rates.append(cell.test.length / elapsed)
        memory = rss_bytes()
        if memory is not None:
            cell.memory.append(memory)
        cell.peak = peak_rss_bytes()

    def _run(self, cell: _Cell, length: int, speeds: list[float]) -> float:
        """Returns the seconds of a test with `length` tokens, from the state of its depth."""
        with np.load(cell.state_file) as state:
            self.session.set_state(dict(state))
        tokens = self._random_tokens(length)
        if cell.test.kind == "pp":
            return seconds(partial(self.session.prefill, tokens.T))
        return self._steps(tokens, speeds)

    def _row(self, cell: _Cell, lowest: _Cell) -> BenchRow:
        """Returns the row of a cell; `lowest` is the cell of its test at the lowest depth."""
        info = self.session.info
        test = cell.test

        rate = mean(cell.rates)
        median_rate = median(cell.rates)
        deviation = stdev(cell.rates) if len(cell.rates) > 1 else 0.0

        bytes_per_token = info.weight_bytes * test.weight_reads(info) / test.length
        read_speed = median(cell.speeds)

        state = "processed"
        if cell.depth and self.request.synthetic:
            state = "synthetic"
        memory = round(median(cell.memory)) if cell.memory else None

        return BenchRow(
            test=test.name,
            depth=cell.depth,
            state=state,
            repetitions=len(cell.rates),
            tokens_per_second=rate,
            deviation=deviation,
            median_tokens_per_second=median_rate,
            time_ratio=median(lowest.rates) / median_rate,
            bytes_per_token=bytes_per_token,
            roofline_bytes_per_second=read_speed,
            roofline_share=rate * bytes_per_token / read_speed,
            rss_bytes=memory,
            peak_rss_bytes=cell.peak,
            load_seconds=self.load_seconds,
            artifact_bytes=self.artifact.nbytes,
            artifact=self.artifact.path.resolve().name,
            engine=info.engine,
            engine_version=info.engine_version,
            kernels=info.kernels,
            threads=info.threads,
            cpu=cpu(),
        )

    def _steps(self, tokens: np.ndarray, speeds: list[float]) -> float:
        """Returns the steps' seconds; adds read speeds measured in between to `speeds`."""
        total = 0.0
        since_reading = 0.0
        for token in tokens:
            if since_reading >= SLICE_SECONDS:
                speeds.append(self.read_speed())
                since_reading = 0.0
            elapsed = seconds(partial(self.session.step, token))
            total += elapsed
            since_reading += elapsed
        return total

    def _random_tokens(self, length: int) -> np.ndarray:
        """Returns random token ids, int64 [length, 1]."""
        return self._generator.integers(0, self.session.vocab_size, (length, 1))

    def state_at(self, depth: int, state: State) -> State:
        """Returns the state at a depth, reached from `state` at a lower depth."""
        ahead = depth - int(state[POSITION][0])
        if not ahead:
            return state
        if self.request.synthetic:
            return synthetic_state(state, depth, self._generator)

        self.session.set_state(state)
        start = time.perf_counter()
        done = 0
        with task(f"Processing tokens up to depth {depth:,}", ahead, "tokens") as advance:
            while done < ahead:
                length = min(PIECE, ahead - done)
                self.session.prefill(self._random_tokens(length).T)
                advance(length)
                done += length
                minutes = (time.perf_counter() - start) / done * ahead / 60
                if done == PIECE and minutes > PATIENCE_MINUTES:
                    note(f"this takes about {minutes:.0f} minutes; --synthetic uses a random state")
        return self.session.get_state()


def synthetic_state(like: State, depth: int, generator: np.random.Generator) -> State:
    """Returns random numbers as the state at `depth`; a step costs the same for any numbers."""
    random = {}
    for name, array in like.items():
        values = 0.1 * generator.standard_normal(array.shape)
        random[name] = values.astype(array.dtype)
    random[POSITION] = np.full_like(like[POSITION], depth)
    return random
