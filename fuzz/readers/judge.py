"""Says what an execution ended in: accepted, refused in one line, or a finding."""

import os
import resource
import traceback
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fuzz.readers.folders import NotAnInput
from fuzz.readers.target import Target, WrongAccept
from rgexport.cli import error_line
from rgexport.errors import RequestError

MOST_LINE = 1000
"""Characters of a line that tells what is wrong."""
NOISE_BYTES = 24 << 20
"""By which the memory of a process grows for other reasons, such as the fuzzer's own corpus."""
_HARMFUL = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Categories of characters that a terminal may take for more than a sign on a line."""
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Outcome:
    """`kind` is accepted, refused, skipped or found; `finding` says of the last what it is."""

    kind: str
    finding: str = ""
    detail: str = ""


class Judge:
    """Runs inputs through a target; knows what memory its sound inputs take."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        self._base = self._sound = self._most = 0

    def begin(self, seeds: Iterable[bytes]) -> None:
        """Reads the sound inputs, twice: the first time loads libraries.

        Raises:
            ValueError: one of them is not accepted.
        """
        for data in (kept := list(seeds)):
            if (outcome := self(data)).kind != "accepted":
                raise ValueError(f"a seed of {self.target.name}: {outcome}")
        _reset_peak()
        self._base = _peak()
        for data in kept:
            self(data)
        self._sound = self._most = _peak()

    def memory(self) -> dict[str, int]:
        """Peaks of the process in bytes: reading sound inputs, and over all."""
        return {"sound_bytes": self._sound, "peak_bytes": max(self._most, _peak())}

    def __call__(self, data: bytes) -> Outcome:
        """One input; everything but an interrupt is caught."""
        outcome, much = self._watched(data)
        if much and outcome.kind != "found":  # once may be a library that was loaded
            outcome, much = self._watched(data)
        if much and outcome.kind != "found":
            return Outcome("found", f"memory grew by more than {self._allowed() >> 20} MB")
        return outcome

    def _allowed(self) -> int:
        return 2 * (self._sound - self._base) + NOISE_BYTES

    def _watched(self, data: bytes) -> tuple[Outcome, bool]:
        """The outcome, and whether memory grew more than it may."""
        before = _peak()
        try:
            outcome = self._read(data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust's is no Exception
            outcome = Outcome("found", _describe(error), str(error))
        much = self._sound and _peak() - before > self._allowed()
        if much:
            self._most = max(self._most, _peak())
            _reset_peak()
        return outcome, bool(much)

    def _read(self, data: bytes) -> Outcome:
        try:
            answer = self.target.read(data, self.folder)
        except NotAnInput:
            return Outcome("skipped")
        except (RequestError, OSError) as error:
            return _judge_line(error_line(error))
        try:
            self.target.agree(data, self.folder, answer)
        except WrongAccept as error:
            complaint, detail = error.args
            return Outcome("found", f"wrong accept: {complaint}", str(detail))
        return Outcome("accepted")


def _judge_line(line: str) -> Outcome:
    harmful = {unicodedata.category(c) for c in line if c not in _JOINERS} & _HARMFUL
    if harmful:
        return Outcome("found", "a line that a terminal would obey", repr(line))
    if not 10 < len(line) <= MOST_LINE:
        return Outcome("found", "a line of no sensible length", f"{len(line)} characters")
    return Outcome("refused", detail=line)


def _describe(error: BaseException) -> str:
    """The type of an error and the last place of ours that it passed: one finding each."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/rgexport/" in f.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {place}"


def _peak() -> int:
    """Bytes of memory that the process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    """Forgets the peak, where the system lets it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return
    os.sched_yield()
