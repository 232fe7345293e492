"""Which ggml operator should compute the RG-LRU's recurrence? Needs `make llama`.

    python -m bench.llama_scan [out/llama]

Builds `scan_ops.cpp` against the patched llama.cpp and prints one row per way and length, of 2560
channels on the CPU: microseconds, and the largest error against float64.
"""

import csv
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rgexport.kernels.llama_cpp.port import RELEASE
from rgexport.reporting.tables import Table, render
from rgexport.runtimes.machine import environment

SOURCE = Path(__file__).with_name("scan_ops.cpp")
LIBRARIES = "ggml", "ggml-cpu", "ggml-base"
HEADER = "way", "tokens", "µs", "largest error"


def main() -> None:
    """Builds, runs and prints."""
    build = Path(sys.argv[1] if len(sys.argv) > 1 else "out/llama").resolve()
    facts = environment()
    rows = measure(build, threads=int(facts["cores"]))
    title = f"h[t] = a[t] h[t-1] + x[t] on {facts['cpu']}, {facts['cores']} threads"
    print(render([Table(title, HEADER, rows, numbers=HEADER[1:])]), end="")


def measure(build: Path, threads: int) -> list[tuple[str, ...]]:
    """Rows of `HEADER`, from a program that lives only as long as it runs."""
    headers = build / f"src-{RELEASE}" / "vendor" / "llama.cpp" / "ggml" / "include"
    libraries = build / f"build-{RELEASE}" / "bin"
    with TemporaryDirectory() as folder:
        program = Path(folder) / "scan_ops"
        links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", *(f"-l{name}" for name in LIBRARIES)]
        compiler = ["c++", "-O2", "-std=c++17", f"-I{headers}", str(SOURCE), "-o", str(program)]
        run([*compiler, *links])
        return [tuple(row) for row in csv.reader(run([program, threads]).splitlines())]


def run(command: list[object]) -> str:
    """The output of a command, which ends this program if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"failed: {shlex.join(words)}")
    return done.stdout


if __name__ == "__main__":
    main()
