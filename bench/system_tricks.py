"""Measures the gain of tricks with the system: a 2B with and without each, in turns.

`python -m bench.system_tricks` takes 10 GB of disk and ten minutes. A trick stays if this shows
a gain of 5 %, or if a test fails without it. Each measurement is the CPU time of one thread, which
other programs disturb least, in a new process.
"""

import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.onnx_models import STORAGES, make_missing
from rgexport.artifacts.artifact import remember_verified
from rgexport.artifacts.manifest_reader import read_manifest
from rgexport.artifacts.onnx.model_file import DATA_FILE
from rgexport.artifacts.opening import open_artifact
from rgexport.files import atomic, hashing
from rgexport.progress import note
from rgexport.runtimes.huge_pages import BackgroundAdvice
from rgexport.runtimes.onnx import session
from rgexport.runtimes.onnx.session import OrtSession

ROUNDS, STEPS = 7, 24
_PIECE = 1 << 20
"""Written at once, as an export does."""


def opening(artifact: Path) -> float:
    """Seconds to open an artifact; once before, so that its hashes may be known."""
    open_artifact(artifact)
    began = time.process_time()
    open_artifact(artifact)
    return time.process_time() - began


def decode(artifact: Path, native: bool = True) -> float:
    """Seconds for a token, when nothing is done in the background any more."""
    before = set(threading.enumerate())
    opened = OrtSession(open_artifact(artifact), threads=1, native=native)
    tokens = np.random.default_rng(0).integers(0, opened.vocab_size, (STEPS, 1))
    opened.step(tokens[0])
    for thread in set(threading.enumerate()) - before:
        thread.join()
    return statistics.median(_seconds(opened, token) for token in tokens)


def decode_stock(artifact: Path) -> float:
    """The same with ONNX Runtime's own kernels."""
    return decode(artifact, native=False)


def decode_written(artifact: Path) -> float:
    """The same with our kernels, from weights that were written a moment ago."""
    copy = artifact.with_name(f"{artifact.name}-written")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(artifact, copy, ignore=shutil.ignore_patterns(DATA_FILE))
    try:
        with open(artifact / DATA_FILE, "rb") as source, open(copy / DATA_FILE, "wb") as target:
            shutil.copyfileobj(source, target, _PIECE)
        atomic.evict_from_page_cache(copy / DATA_FILE)
        remember_verified(copy, read_manifest(copy))
        return decode(copy)
    finally:
        shutil.rmtree(copy)


def _seconds(opened: OrtSession, token: np.ndarray) -> float:
    began = time.thread_time()
    opened.step(token)
    return time.thread_time() - began


@dataclass(frozen=True)
class Trick:
    """What shows it, and how to do without: the module, the name in it, and a substitute."""

    measure: Callable[[Path], float]
    module: object
    name: str
    substitute: object


TRICKS = {
    "known hashes": Trick(opening, hashing, "_read_cache", dict),
    "MADV_COLLAPSE": Trick(
        decode_stock, session, "huge_pages", lambda: nullcontext(BackgroundAdvice())
    ),
    "page-cache eviction": Trick(
        decode_written, atomic, "evict_from_page_cache", lambda path: None
    ),
}


def measured(name: str, artifact: Path, *, with_it: bool) -> float:
    """Seconds in this process, which may do without the trick from now on."""
    trick = TRICKS[name]
    if not with_it:
        setattr(trick.module, trick.name, trick.substitute)
    return trick.measure(artifact)


def _measured_apart(name: str, artifact: Path, *, with_it: bool) -> float:
    command = [sys.executable, "-m", "bench.system_tricks", name, str(artifact), str(int(with_it))]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main() -> None:
    """Prints the gain of each trick; a child process prints one measurement."""
    if len(sys.argv) == 4:
        name, artifact, word = sys.argv[1:]
        print(measured(name, Path(artifact), with_it=word == "1"))
        return
    storage = STORAGES["int4-128"]
    make_missing([storage], transformer=False)
    for name in TRICKS:
        found: dict[bool, list[float]] = {True: [], False: []}
        for index in range(ROUNDS):
            note(f"{name}, round {index + 1} of {ROUNDS}")
            for with_it in found:
                found[with_it].append(_measured_apart(name, storage.artifact, with_it=with_it))
        with_it, without = (1000 * statistics.median(found[with_it]) for with_it in (True, False))
        gain = without / with_it - 1
        print(f"{name}: {with_it:.1f} ms with it, {without:.1f} ms without: {gain:+.1%}")


if __name__ == "__main__":
    main()
