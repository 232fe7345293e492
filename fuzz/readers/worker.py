"""Fuzzes one target in this process: `python -m fuzz.readers.worker REQUEST`, a JSON object.

libFuzzer, by way of atheris, chooses inputs by the branches that they reach in `rgexport`. It ends
the process where an execution takes too long or crashes natively; whoever started it goes on with
another one. Everything else that is wrong is noted, and the fuzzing goes on.
"""

import hashlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

import atheris

HANG_SECONDS = 10
BROKEN = 3
"""The exit code where the fuzzer itself is at fault."""
ROOM_BYTES = 2 << 30
"""Of addresses beyond those of the start: what asks for more gets a MemoryError."""


class Worker:
    """Counts what came of the executions, and keeps the inputs that were found."""

    def __init__(self, request: dict[str, Any], target: Any, folder: Path) -> None:
        from fuzz.readers.judge import Judge

        self.target, self.judge = target, Judge(target, folder)
        self.report, self.findings = Path(request["report"]), Path(request["findings"])
        self.runs = request["runs"]
        self.counts = {"accepted": 0, "refused": 0}
        self.executions, self.slowest, self.began = 0, 0.0, time.monotonic()
        self.found: dict[str, dict[str, Any]] = {}

    def execute(self, data: bytes) -> None:
        """One execution, which libFuzzer watches."""
        began = time.perf_counter()
        outcome = self.judge(data)
        self.executions += 1
        self.slowest = max(self.slowest, time.perf_counter() - began)
        if outcome.finding:
            self._keep(data, outcome.finding, outcome.detail)
        else:
            self.counts[outcome.kind] = self.counts.get(outcome.kind, 0) + 1
        if self.executions == self.runs or self.executions % 64 == 0:
            self.write()

    def _keep(self, data: bytes, finding: str, detail: str) -> None:
        """The smallest input of each finding."""
        known = self.found.setdefault(finding, {"count": 0, "bytes": 1 << 62})
        known["count"] += 1
        if len(data) < known["bytes"]:
            word = hashlib.sha256(finding.encode()).hexdigest()[:12]
            path = self.findings / word
            path.write_bytes(data)
            known.update(bytes=len(data), path=str(path), what=finding, detail=detail[:300])

    def write(self) -> None:
        """Leaves the figures where whoever started this looks for them."""
        figures = {
            "executions": self.executions,
            "seconds": time.monotonic() - self.began,
            "slowest": self.slowest,
            **self.counts,
            **self.judge.memory(),
            "found": list(self.found.values()),
        }
        partial = self.report.with_suffix(".partial")
        partial.write_text(json.dumps(figures))
        partial.replace(self.report)


def main() -> None:
    """Makes the seeds, and hands over to libFuzzer, which does not come back."""
    request = json.loads(sys.argv[1])
    os.environ["RGEXPORT_CACHE"] = "/dev/null/none"  # hashes that were seen before must not count
    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["rgexport"]):
        from fuzz.readers.targets import load_target

        target = load_target(request["target"])
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    corpus = Path(request["corpus"])
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(target.seeds(folder / "making")):
        (seeds / str(number)).write_bytes(seed)
    worker = Worker(request, target, folder / "input")
    known = [path.read_bytes() for path in sorted(seeds.iterdir())]
    try:
        worker.judge.begin(known)
    except ValueError as error:
        sys.exit(str(error))
    worker.write()
    _limit_addresses()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        # Of inputs that reach the same, libFuzzer keeps the shortest, and those are mostly damaged.
        source = data if data and random.randrange(2) else random.choice(known)
        try:
            for _ in range(8):
                changed = target.mutate(source, random)
                if len(changed) <= most:
                    return changed
        except Exception:  # libFuzzer would wait for ever
            traceback.print_exc(file=sys.__stderr__)
            os._exit(BROKEN)
        return random.choice(known)

    flags = [
        *(f"-runs={request['runs']}", f"-max_total_time={request['seconds']}"),
        *(f"-seed={request['seed']}", f"-timeout={HANG_SECONDS}", "-rss_limit_mb=0"),
        *(f"-max_len={target.max_bytes}", "-len_control=0", "-print_final_stats=1", "-reload=0"),
        f"-artifact_prefix={request['findings']}/",
    ]
    arguments = [sys.argv[0], *flags, str(corpus), str(seeds)]
    # Readers tell how far they are; libFuzzer writes past it.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the whole process
    atheris.Setup(arguments, worker.execute, custom_mutator=mutate)
    atheris.Fuzz()


def _limit_addresses() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
