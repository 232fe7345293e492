"""Fuzzes the readers: `python -m fuzz.readers [--minutes N | --runs N] [--target NAME]`."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.readers.targets import TARGETS

_COVERAGE = re.compile(r"cov: (\d+) ft: (\d+)")
_LEAST_SECONDS = 2.0
"""The shortest run: below, the start of the process takes longer."""
BROKEN, _HUNG = 3, 70
"""Exit codes of a process: the fuzzer is at fault (see `worker`); an execution took too long."""


@dataclass
class Share:
    """What came of one target, over all of its processes."""

    name: str
    executions: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    coverage: int = 0
    sound_bytes: int = 0
    peak_bytes: int = 0
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, figures: dict[str, Any]) -> None:
        """Adds what one process reported."""
        for name in ("executions", "accepted", "refused", "seconds"):
            setattr(self, name, getattr(self, name) + figures[name])
        for name in ("slowest", "sound_bytes", "peak_bytes"):
            setattr(self, name, max(getattr(self, name), figures[name]))
        self.found |= {finding["what"]: finding for finding in figures["found"]}

    def row(self) -> tuple[str, ...]:
        """For the table."""
        rate = self.executions / self.seconds if self.seconds else 0.0
        peaks = f"{self.peak_bytes / 1e6:.0f} / {self.sound_bytes / 1e6:.0f}"
        return (
            *(self.name, f"{self.executions:,}", f"{rate:,.0f}", f"{self.coverage:,}"),
            *(f"{self.accepted:,}", f"{self.refused:,}", peaks, f"{1000 * self.slowest:.0f}"),
            str(len(self.found)),
        )


HEADER = (
    *("target", "executions", "per second", "coverage", "accepted", "refused"),
    *("peak MB / sound", "slowest ms", "findings"),
)


def fuzz(name: str, runs: int, seconds: float, seed: int, out: Path) -> Share:
    """Fuzzes one target in processes of its own, until all is done or the time is up."""
    share, began = Share(name), time.monotonic()
    while runs < 0 or share.executions < runs:
        left = seconds - (time.monotonic() - began) if seconds else 0.0
        if seconds and left < _LEAST_SECONDS and (share.executions or share.found):
            break
        wanted = runs - share.executions if runs >= 0 else -1
        if _process(share, wanted, max(1, int(left)) if seconds else 0, seed, out) == 0:
            break
        seed += 1
    return share


def _process(share: Share, runs: int, seconds: int, seed: int, out: Path) -> int:
    """One process; adds what it reports, and what ended it, if that was not its work's end."""
    with tempfile.TemporaryDirectory() as folder:
        findings = out / "findings" / share.name.replace(":", ".")
        findings.mkdir(parents=True, exist_ok=True)
        report, log = Path(folder) / "report.json", Path(folder) / "log"
        request = {
            **{"target": share.name, "runs": runs, "seconds": seconds, "seed": seed},
            **{"report": str(report), "findings": str(findings)},
            "corpus": str(out / "corpus" / share.name),
        }
        command = [sys.executable, "-m", "fuzz.readers.worker", json.dumps(request)]
        before = set(findings.iterdir())
        environment = os.environ | {"TMPDIR": folder}
        with log.open("wb") as output:
            code = subprocess.run(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
            ).returncode
        text = log.read_text(errors="replace")
        share.coverage = max([share.coverage, *(int(c) for c, _ in _COVERAGE.findall(text))])
        if code == BROKEN or not report.is_file():
            raise SystemExit(f"{text[-4000:]}\nthe fuzzer of {share.name} is broken")
        share.add(json.loads(report.read_text()))
        if code:
            _note_end(share, code, sorted(set(findings.iterdir()) - before), text)
        return code


def _note_end(share: Share, code: int, new: list[Path], text: str) -> None:
    """What libFuzzer ended a process for, with the input that did it."""
    inputs = [path for path in new if re.match(r"(timeout|crash|oom|leak)-", path.name)]
    what = "took longer than 10 s" if code == _HUNG else f"ended the process with code {code}"
    for path in inputs or [Path("none")]:
        frames = re.findall(r"#\d+ 0x\w+ in (\S+)", text)[:8]
        word = f"{what} ({path.name})"
        share.found[word] = {"what": word, "path": str(path), "count": 1, "detail": str(frames)}


def main() -> int:
    """Exit code 1 where anything was found."""
    parser = argparse.ArgumentParser(prog="fuzz.readers", description=__doc__)
    parser.add_argument("--minutes", type=float, help="of all targets together")
    parser.add_argument("--runs", type=int, help="executions of each target")
    parser.add_argument("--target", action="append", help="[default: all]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="[default: out/fuzz]")
    asked = parser.parse_args()
    names = asked.target or list(TARGETS)
    minutes = asked.minutes or (0 if asked.runs else 1.0)
    seconds = 60 * minutes * min(asked.jobs, len(names)) / len(names)
    shares = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        fuzzed = (
            pool.submit(fuzz, name, asked.runs or -1, seconds, asked.seed, asked.out)
            for name in names
        )
        for future in as_completed(list(fuzzed)):
            shares.append(future.result())
            _print_share(shares[-1])
    _print_row(("all", f"{sum(share.executions for share in shares):,}"))
    if asked.json:
        asked.json.write_text(json.dumps([vars(share) for share in shares], indent=1) + "\n")
    return 1 if any(share.found for share in shares) else 0


def _print_share(share: Share) -> None:
    _print_row(share.row())
    for finding in share.found.values():
        print(f"  {finding['what']} ({finding['count']} times): {finding['path']}")
        print(f"    {finding['detail'][:300]!r}", flush=True)


def _print_row(row: tuple[str, ...]) -> None:
    print(
        "  ".join(cell.rjust(max(len(h), 10)) for cell, h in zip(row, HEADER, strict=False)),
        flush=True,
    )


if __name__ == "__main__":
    _print_row(HEADER) if "--help" not in sys.argv and "-h" not in sys.argv else None
    sys.exit(main())
