"""How fast an artifact runs: prompts, tokens, and both at a depth, beside the memory's read speed.

What llama-bench measures, through the Session interface, so that every format is measured alike.
The machine's read speed drifts within minutes; it is measured between the timed pieces, and a row
compares means and medians of the same minutes.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Self

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.griffin.state import POSITION, State
from rgexport.progress import Advance, note, task
from rgexport.runtimes.bench_rows import Row
from rgexport.runtimes.engines import open_session
from rgexport.runtimes.environment import cpu
from rgexport.runtimes.peak_memory import peak_rss_bytes
from rgexport.runtimes.roofline import ReadSpeed, roofline, seconds
from rgexport.runtimes.session import Session, SessionInfo

MOST = 1 << 24
"""The largest length or depth."""
WARM_UP_SECONDS = 4.0
"""Engines get their weights into huge pages in the background, for some two seconds."""
SLICE_SECONDS = 1.0
"""Steps for about so long stand between two readings of the memory."""
PIECE = 512
"""Tokens at a time on the way to a depth."""
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class BenchRequest:
    """What to measure; each depth with each prompt length and each number of tokens."""

    prompts: tuple[int, ...] = (512,)
    tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    repetitions: int = 5
    synthetic: bool = False
    """Whether a depth is a state of random numbers instead of tokens that were processed."""

    def __post_init__(self) -> None:
        """Lengths of 0 stand for none.

        Raises:
            RequestError: nothing to measure.
        """
        if not any((*self.prompts, *self.tokens)):
            raise RequestError("there is nothing to measure: -p and -n are 0; give one a length")

    @classmethod
    def parse(cls, prompts: str, tokens: str, depths: str, **rest: Any) -> Self:
        """A request whose lists are texts such as `128,512`.

        Raises:
            RequestError: a text that is no list of lengths, or nothing to measure.
        """
        return cls(_lengths("-p", prompts), _lengths("-n", tokens), _lengths("-d", depths), **rest)

    @property
    def trials(self) -> list["Trial"]:
        """Prompts first, in the order asked for."""
        prompts = [Trial("pp", length) for length in self.prompts if length]
        return prompts + [Trial("tg", length) for length in self.tokens if length]


@dataclass(frozen=True)
class Trial:
    """A prompt of `length` tokens (`pp`), or as many tokens one by one (`tg`)."""

    kind: str
    length: int

    @property
    def name(self) -> str:
        """As llama-bench writes it: `pp512`."""
        return f"{self.kind}{self.length}"

    @property
    def warm_up(self) -> int:
        """A length after which an engine has allocated what it needs."""
        return min(self.length, PIECE) if self.kind == "pp" else 1

    def readings(self, info: SessionInfo) -> int:
        """How often the engine reads all weights."""
        if self.kind != "pp":
            return self.length
        chunks, rest = divmod(self.length, info.prefill_chunk)
        return chunks + (rest if info.whole_chunks else min(rest, 1))


def bench_artifact(path: Path, request: BenchRequest, *, threads: int | None = None) -> list[Row]:
    """Opens an artifact and measures it.

    Raises:
        RequestError: no sound artifact, or too little memory.
    """
    artifact = Artifact.open(path)
    began = time.perf_counter()
    session = open_session(artifact, threads=threads)
    took = time.perf_counter() - began
    with roofline(session.info.threads) as read_speed:
        return list(Measuring(session, request, read_speed, artifact.path, took).rows())


@dataclass
class Measuring:
    """A session under test. One conversation; every token is random, as in llama-bench."""

    session: Session
    request: BenchRequest
    read_speed: ReadSpeed
    artifact: Path
    load_seconds: float
    _generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def rows(self) -> Iterator[Row]:
        """Measures depth by depth, the lowest first: each goes on from the one before."""
        self._warm_up()
        self.session.reset()
        state = self.session.get_state()
        depths, trials = sorted(set(self.request.depths)), self.request.trials
        for depth in depths:
            state = self.state_at(depth, state)
            total = len(trials) * self.request.repetitions
            with task(f"Measuring at depth {depth:,}", total, "repetitions") as advance:
                yield from [self._row(trial, depth, state, advance) for trial in trials]

    def _row(self, trial: Trial, depth: int, state: State, advance: Advance) -> Row:
        run = {"pp": self._prompt, "tg": self._tokens}[trial.kind]
        self.session.set_state(state)
        run(trial.warm_up, [])
        rates, speeds = [], []
        for _ in range(self.request.repetitions):
            self.session.set_state(state)
            speeds.append(self.read_speed())
            rates.append(trial.length / run(trial.length, speeds))
            advance(1)
        speeds.append(self.read_speed())
        return self._result(trial, depth, rates, speeds)

    def _result(self, trial: Trial, depth: int, rates: list[float], speeds: list[float]) -> Row:
        info = self.session.info
        per_token = info.weight_bytes * trial.readings(info) / trial.length
        rate, read_speed = mean(rates), median(speeds)
        return Row(
            test=trial.name,
            depth=depth,
            state="synthetic" if depth and self.request.synthetic else "processed",
            repetitions=len(rates),
            tokens_per_second=rate,
            deviation=stdev(rates) if len(rates) > 1 else 0.0,
            bytes_per_token=per_token,
            roofline_bytes_per_second=read_speed,
            roofline_share=rate * per_token / read_speed,
            peak_rss_bytes=peak_rss_bytes(),
            load_seconds=self.load_seconds,
            artifact_bytes=_size(self.artifact),
            artifact=self.artifact.resolve().name,
            engine=info.engine,
            engine_version=info.engine_version,
            threads=info.threads,
            cpu=cpu(),
        )

    def _warm_up(self) -> None:
        until = time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < until:
            if self.session.position[0] >= PIECE:
                self.session.reset()
            self.session.step(self._random(1)[0])

    def _prompt(self, length: int, speeds: list[float]) -> float:
        tokens = self._random(length).T
        return seconds(lambda: self.session.prefill(tokens))

    def _tokens(self, length: int, speeds: list[float]) -> float:
        """Seconds of `length` steps; what the memory reads in between goes to `speeds`."""
        total = since = 0.0
        for token in self._random(length):
            if since >= SLICE_SECONDS:
                speeds.append(self.read_speed())
                since = 0.0
            began = time.perf_counter()
            self.session.step(token)
            took = time.perf_counter() - began
            total, since = total + took, since + took
        return total

    def _random(self, length: int) -> np.ndarray:
        return self._generator.integers(0, self.session.vocab_size, (length, 1))

    def state_at(self, depth: int, state: State) -> State:
        """The state after `depth` tokens, going on from `state`, which has seen no more."""
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
                if done == PIECE:
                    _tell_patience((time.perf_counter() - began) / done * ahead)
        return self.session.get_state()


def synthetic_state(like: State, depth: int, generator: np.random.Generator) -> State:
    """A state of random numbers that says that it has seen `depth` tokens.

    What a step costs depends on shapes and on the position, not on the numbers.
    """
    made_up = {
        name: (0.1 * generator.standard_normal(array.shape)).astype(array.dtype)
        for name, array in like.items()
    }
    return made_up | {POSITION: np.full_like(like[POSITION], depth)}


def _lengths(option: str, text: str) -> tuple[int, ...]:
    """The numbers of a list, each once."""
    words = text.split(",")
    if not all(re.fullmatch("[0-9]{1,8}", word) and int(word) <= MOST for word in words):
        raise RequestError(
            f"{option} is {text!r}; expected numbers from 0 to {MOST}, such as 512 or 128,512"
        )
    return tuple(dict.fromkeys(map(int, words)))


def _tell_patience(expected: float) -> None:
    if expected > PATIENCE_SECONDS:
        note(f"this takes about {expected / 60:.0f} minutes; --synthetic makes a state up instead")


def _size(artifact: Path) -> int:
    files = [artifact] if artifact.is_file() else artifact.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
