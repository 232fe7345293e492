"""Export and decode at a released model's size, with a synthetic checkpoint.

    python -m bench.run [2b|9b] [int4|int8|…|q4_0|q4_k_m|…] [onnx|coreml]

A word of `--precision` makes an ONNX artifact or a Core ML package, a `--type` a GGUF file (which
takes `make llama`). Prints one JSON object: seconds, peak memory and size of the export, and a row
of `rgexport bench`, but for Core ML where there is no Mac to run it.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rgexport.progress import note
from rgexport.quantize.plan import COREML_PRECISIONS
from rgexport.runtimes.bench.measure import bench_artifact
from rgexport.runtimes.bench.request import BenchRequest
from rgexport.runtimes.machine import environment, peak_bytes

FOLDER = Path("out/bench")
DEPTH = 4096
"""Tokens before those that are timed: beyond the window, where a step reads all of it."""
DECODE = BenchRequest(prompts=(), tokens=(24,), depths=(DEPTH,), repetitions=3, synthetic=True)
START = "from rgexport.cli import main; main()"


def main() -> None:
    """Runs everything; what was made is kept for the next run, except the artifact."""
    size, precision, kind = (*sys.argv[1:], *("2b", "int4", "onnx")[len(sys.argv) - 1 :])
    FOLDER.mkdir(parents=True, exist_ok=True)
    checkpoint = FOLDER / f"{size}-random"
    if not checkpoint.exists():
        command("random", "--size", size, "-o", checkpoint)
    target, *asked = request(checkpoint, precision, kind)
    export = command(*asked, "-m", checkpoint, "-o", target, "--force", "--no-check")
    result = {
        "size": size,
        "precision": precision,
        "environment": environment(),
        "export": export | {"bytes": size_of(target)},
        "decode": [asdict(row) for row in bench_artifact(target, DECODE)] if runs(target) else [],
    }
    print(json.dumps(result, indent=1))


def request(checkpoint: Path, precision: str, kind: str) -> tuple[Path, str, str, str]:
    """Where the artifact goes, and the verb that makes it with its options."""
    target = f"{checkpoint}-{precision}"
    if precision in COREML_PRECISIONS:
        return Path(f"{target}-{kind}"), kind, "--precision", precision
    return Path(f"{target}.gguf"), "gguf", "--type", precision


def size_of(artifact: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [artifact] if artifact.is_file() else artifact.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def runs(artifact: Path) -> bool:
    """Whether this machine is one for the artifact; an interpreter's speed says nothing."""
    return not artifact.name.endswith("-coreml") or sys.platform == "darwin"


def command(*arguments: str | Path) -> dict[str, float]:
    """Runs rgexport in a process of its own; its wall time and peak memory."""
    note(f"rgexport {' '.join(map(str, arguments))}")
    return measured([sys.executable, "-c", START, *map(str, arguments)])


def measured(program: list[str]) -> dict[str, float]:
    """Runs a program; its wall time and peak memory."""
    start = time.perf_counter()
    with subprocess.Popen(program, stdout=sys.stderr) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(usage)}


if __name__ == "__main__":
    main()
