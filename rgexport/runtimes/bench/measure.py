"""Measures an artifact's speed: prompts and tokens, at depths, beside the memory's read speed.

The tests are llama-bench's. The machine's read speed drifts within minutes, so tests at all depths
take turns, and the memory is read between the timed pieces.
"""

import csv
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.opening import open_artifact
from rgexport.errors import RequestError
from rgexport.griffin.state import POSITION, State
from rgexport.progress import note, task
from rgexport.reporting.tables import Table, markdown, render
from rgexport.runtimes.bench.roofline import ReadSpeed, roofline, seconds
from rgexport.runtimes.engine import open_session
from rgexport.runtimes.machine import cpu, peak_rss_bytes, rss_bytes
from rgexport.runtimes.session import Session, SessionInfo
from rgexport.units import amount

MOST = 1 << 24
PIECE = 512
"""Tokens per prefill, on the way to a depth and for warming up."""
WARM_UP_SECONDS = 4.0
"""Longer than the background work of an engine, which moves weights to huge pages for about 2 s."""
SLICE_SECONDS = 1.0
"""About how long steps run between two readings of the memory."""
PATIENCE_MINUTES = 1.0


@dataclass(frozen=True)
class BenchTest:
    """A prompt of `length` tokens (`pp`), or as many tokens one by one (`tg`)."""

    kind: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.length}"

    def weight_reads(self, info: SessionInfo) -> int:
        if self.kind != "pp":
            return self.length
        chunks, remainder = divmod(self.length, info.prefill_chunk)
        return chunks + (remainder if info.whole_chunks else min(remainder, 1))


@dataclass(frozen=True)
class BenchRequest:
    """Lengths to measure at each depth, which is random numbers if `synthetic`."""

    prompts: tuple[int, ...] = (512,)
    tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    repetitions: int = 5
    synthetic: bool = False

    def __post_init__(self) -> None:
        if not any((*self.prompts, *self.tokens)):
            raise RequestError("there is nothing to measure: -p and -n are 0; give one a length")
        if self.synthetic and not any(self.depths):
            raise RequestError("--synthetic changes nothing at depth 0; give one, such as -d 4096")

    @classmethod
    def parse(cls, prompts: str, tokens: str, depths: str, **rest: Any) -> Self:
        return cls(_lengths("-p", prompts), _lengths("-n", tokens), _lengths("-d", depths), **rest)

    @property
    def tests(self) -> list[BenchTest]:
        prompts = [BenchTest("pp", length) for length in self.prompts if length]
        return prompts + [BenchTest("tg", length) for length in self.tokens if length]


def _lengths(option: str, text: str) -> tuple[int, ...]:
    lengths = text.split(",")
    if not all(re.fullmatch("[0-9]{1,8}", n) and int(n) <= MOST for n in lengths):
        raise RequestError(
            f"{option} is {text!r}; expected numbers from 0 to {MOST}, such as 512 or 128,512"
        )
    return tuple(dict.fromkeys(map(int, lengths)))


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
    artifact = open_artifact(path, allow_foreign=allow_foreign)
    began = time.perf_counter()
    session = open_session(artifact, threads=threads)
    elapsed = time.perf_counter() - began
    try:
        with roofline(session.info.threads) as read_speed:
            measurement = BenchMeasurement(session, request, read_speed, artifact, elapsed)
            return list(measurement.rows())
    finally:
        session.close()


@dataclass
class _Cell:
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
        until = time.perf_counter() + WARM_UP_SECONDS
        with task("Warming up", leaves_line=False):
            while time.perf_counter() < until:
                if self.session.position[0] >= PIECE:
                    self.session.reset()
                self.session.step(self._random(1)[0])
        with TemporaryDirectory(prefix="rgexport-bench-") as folder:
            self.session.reset()
            state, cells = self.session.get_state(), []
            for depth in sorted(set(self.request.depths)):
                state = self._state_at(depth, state)
                file = Path(folder, f"{depth}.npz")  # not in memory, to save it
                np.savez(file, **state)  # type: ignore[arg-type]  # none is named `allow_pickle`
                cells += [_Cell(test, depth, file) for test in self.request.tests]
            self._measure(cells)
        lowest: dict[BenchTest, _Cell] = {}
        for cell in cells:
            yield self._row(cell, lowest.setdefault(cell.test, cell))

    def _measure(self, cells: list[_Cell]) -> None:
        rounds = self.request.repetitions
        with task("Measuring", len(cells) * (rounds + 1), "repetitions") as advance:
            for cell in cells:  # the engine allocates its memory
                self._run(cell, min(cell.test.length, PIECE) if cell.test.kind == "pp" else 1, [])
                advance(1)
            speed = self.read_speed()
            for _ in range(rounds):
                for cell in cells:
                    cell.speeds.append(speed)
                    elapsed = self._run(cell, cell.test.length, cell.speeds)
                    cell.rates.append(cell.test.length / elapsed)
                    cell.memory += [size for size in [rss_bytes()] if size is not None]
                    cell.peak = peak_rss_bytes()
                    cell.speeds.append(speed := self.read_speed())
                    advance(1)

    def _run(self, cell: _Cell, length: int, speeds: list[float]) -> float:
        with np.load(cell.state_file) as state:
            self.session.set_state(dict(state))
        tokens = self._random(length)
        if cell.test.kind == "pp":
            return seconds(lambda: self.session.prefill(tokens.T))
        return self._steps(tokens, speeds)

    def _row(self, cell: _Cell, lowest: _Cell) -> BenchRow:
        info, test, rates = self.session.info, cell.test, cell.rates
        per_token = info.weight_bytes * test.weight_reads(info) / test.length
        rate, read_speed = mean(rates), median(cell.speeds)
        return BenchRow(
            test=test.name,
            depth=cell.depth,
            state="synthetic" if cell.depth and self.request.synthetic else "processed",
            repetitions=len(rates),
            tokens_per_second=rate,
            deviation=stdev(rates) if len(rates) > 1 else 0.0,
            median_tokens_per_second=median(rates),
            time_ratio=median(lowest.rates) / median(cell.rates),
            bytes_per_token=per_token,
            roofline_bytes_per_second=read_speed,
            roofline_share=rate * per_token / read_speed,
            rss_bytes=round(median(cell.memory)) if cell.memory else None,
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
        total = since = 0.0
        for token in tokens:
            if since >= SLICE_SECONDS:
                speeds.append(self.read_speed())
                since = 0.0
            elapsed = seconds(partial(self.session.step, token))
            total, since = total + elapsed, since + elapsed
        return total

    def _random(self, length: int) -> np.ndarray:
        return self._generator.integers(0, self.session.vocab_size, (length, 1))

    def _state_at(self, depth: int, state: State) -> State:
        ahead = depth - int(state[POSITION][0])
        if not ahead:
            return state
        if self.request.synthetic:
            return synthetic_state(state, depth, self._generator)
        self.session.set_state(state)
        began, done = time.perf_counter(), 0
        with task(f"Processing tokens up to depth {depth:,}", ahead, "tokens") as advance:
            while done < ahead:
                piece = min(PIECE, ahead - done)
                self.session.prefill(self._random(piece).T)
                advance(piece)
                done += piece
                minutes = (time.perf_counter() - began) / done * ahead / 60
                if done == PIECE and minutes > PATIENCE_MINUTES:
                    note(f"this takes about {minutes:.0f} minutes; --synthetic uses a random state")
        return self.session.get_state()


def synthetic_state(like: State, depth: int, generator: np.random.Generator) -> State:
    """Returns random numbers as the state at `depth`; a step costs the same for any numbers."""
    random = {
        name: (0.1 * generator.standard_normal(array.shape)).astype(array.dtype)
        for name, array in like.items()
    }
    return random | {POSITION: np.full_like(like[POSITION], depth)}


COLUMNS: dict[str, Callable[[BenchRow], str]] = {
    "test": lambda row: row.test,
    "depth": lambda row: f"{row.depth:,}" + (" (synthetic)" if row.state == "synthetic" else ""),
    "tokens/s": lambda row: f"{row.tokens_per_second:.2f} ± {row.deviation:.2f}",
    "time": lambda row: f"{row.time_ratio:.3f}",
    "weights/token": lambda row: amount(row.bytes_per_token),
    "read speed": lambda row: f"{row.roofline_bytes_per_second / 1e9:.1f} GB/s",
    "share": lambda row: f"{row.roofline_share:.3f}",
    "memory": lambda row: _memory_text(row.rss_bytes),
    "peak": lambda row: _memory_text(row.peak_rss_bytes),
}


def as_json(rows: Sequence[BenchRow]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def as_csv(rows: Sequence[BenchRow]) -> str:
    buffer = io.StringIO()
    records = [asdict(row) for row in rows]
    writer = csv.DictWriter(buffer, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def as_table(rows: Sequence[BenchRow]) -> str:
    header, cells = _header_and_cells(rows)
    *titles, machine = _titles(rows[0])
    return render([*titles, Table(machine, header, cells, header[1:])]).rstrip() + "\n"


def as_markdown(rows: Sequence[BenchRow]) -> str:
    return f"{'; '.join(_titles(rows[0]))}\n\n{markdown(*_header_and_cells(rows))}\n"


def _header_and_cells(rows: Sequence[BenchRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    several = len({row.depth for row in rows}) > 1
    names = tuple(name for name in COLUMNS if several or name != "time")
    return names, [tuple(COLUMNS[name](row) for name in names) for row in rows]


def _titles(row: BenchRow) -> tuple[str, str, str]:
    size, engine = amount(row.artifact_bytes), f"{row.engine} {row.engine_version}"
    return (
        f"{row.artifact}, {size}, opened in {row.load_seconds:.2f} s",
        f"{engine}, {row.kernels} kernels, {row.threads} threads",
        row.cpu,
    )


def _memory_text(size: int | None) -> str:
    return "unknown" if size is None else amount(size)


WRITERS: dict[str, Callable[[Sequence[BenchRow]], str]] = {
    "table": as_table,
    "md": as_markdown,
    "json": as_json,
    "csv": as_csv,
}
