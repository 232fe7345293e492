"""Fuzzes the native ops: `python -m fuzz.ops [--minutes N | --runs N]`.

Exit code 1 where anything was found, 2 where the fuzzer cannot be built.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rgexport.kernels.build import BuildFailed, find_program
from rgexport.kernels.onnx.library import FOLDER as SOURCES

BUILD, OUT = Path("build/fuzz-ops"), Path("out/fuzz/ops")
TARGET = Path(__file__).with_name("target.cmake")
PROGRAM = "fuzz_ops"
_SEEDS, _SEED_BYTES = 64, 160
_LIMITS = "-timeout=10", "-rss_limit_mb=1024", "-max_len=256"
_QUICK = "-len_control=0", "-entropic=0", "-use_counters=0"
"""Without them libFuzzer spends more time on its corpus than on the kernels."""
_EMPTY = (
    'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'
)
_ASAN = {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
_FOUND = re.compile(r"FINDING .*|SUMMARY: .*|.*runtime error: .*|ERROR: libFuzzer: .*")


def build() -> Path:
    """The program, built where it is older than its sources.

    Raises:
        BuildFailed: no Clang, or none with libFuzzer, or no CMake; or it does not compile.
    """
    compiler, cmake = _compiler(), find_program("cmake")
    if cmake is None:
        raise BuildFailed("CMake is not installed")
    options = f"-DPROGRAM={TARGET}", f"-DCMAKE_CXX_COMPILER={compiler}"
    _run(cmake, "-S", SOURCES, "-B", BUILD, *options)
    _run(cmake, "--build", BUILD, "--target", PROGRAM, "--parallel", str(os.cpu_count() or 1))
    return (BUILD / PROGRAM).resolve()


def _compiler() -> str:
    """Clang, if it has libFuzzer."""
    compiler = shutil.which("clang++")
    if compiler is None:
        raise BuildFailed("clang++ is missing; install clang with its runtime, libclang-rt-dev")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text(_EMPTY)
        _run(compiler, source, "-fsanitize=fuzzer,address,undefined", "-o", f"{folder}/empty")
    return compiler


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines[-1:]
        raise BuildFailed(f"{Path(command[0]).name} failed: {' '.join(errors[:1])}")


def fuzz(made: Path, asked: argparse.Namespace) -> tuple[str, bool]:
    """Runs it; what happened, in a paragraph, and whether something was found."""
    corpus, findings = OUT / "corpus", OUT / "findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    _add_seeds(corpus, asked.seed)
    limit = f"-runs={asked.runs}" if asked.runs else f"-max_total_time={int(60 * asked.minutes)}"
    command = [made, corpus, limit, *_LIMITS, *_QUICK, f"-seed={asked.seed}"]
    command += [f"-artifact_prefix={findings}/", "-print_final_stats=1"]
    began = time.monotonic()
    with (OUT / "log").open("wb") as log:
        code = subprocess.run(
            list(map(str, command)), stdout=log, stderr=log, env=os.environ | _ASAN
        ).returncode
    text = (OUT / "log").read_text(errors="replace")
    return _summary(text, time.monotonic() - began, code), code != 0


def _add_seeds(corpus: Path, seed: int) -> None:
    """Random bytes: an empty corpus would begin with ops without numbers."""
    numbers = random.Random(seed)
    for index in range(_SEEDS):
        (corpus / f"seed-{index}").write_bytes(numbers.randbytes(_SEED_BYTES))


def _summary(text: str, seconds: float, code: int) -> str:
    counts = [(int(ran), int(not_)) for ran, not_ in re.findall(r"COUNT \S+ (\d+) (\d+)", text)]
    ran, refused = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    coverage = max((int(edges) for edges in re.findall(r"cov: (\d+)", text)), default=0)
    peak = max((int(mb) for mb in re.findall(r"rss: (\d+)Mb", text)), default=0)
    told = re.findall(r"stat::number_of_executed_units:\s*(\d+)|#(\d+)\t", text)
    executions = max((int(a or b) for a, b in told), default=0)
    found = next(iter(_FOUND.findall(text)), f"exit code {code}") if code else "none"
    where = re.findall(r"Test unit written to (\S+)", text)  # slow ones come before
    return (
        f"{executions:,} executions of the native ops in {seconds:.0f} s "
        f"({executions / max(seconds, 1e-3):,.0f}/s), {coverage:,} edges covered, peak {peak} MB; "
        f"{ran:,} gave the oracle's answer, {refused:,} were refused. "
        f"Findings: {found}{f' ({where[-1]})' if where and code else ''}"
    )


def main() -> int:
    """Builds the fuzzer and runs it."""
    parser = argparse.ArgumentParser(prog="fuzz.ops", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, help="executions, instead of minutes")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    try:
        made = build()
    except BuildFailed as error:
        print(f"the fuzzer of the native ops cannot be built: {error}", file=sys.stderr)
        return 2
    summary, found = fuzz(made, asked)
    print(summary)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
