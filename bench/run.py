"""Export and decode at a released model's size, with a synthetic checkpoint.

    python -m bench.run [2b|9b] [int4|int8|…]

Prints one JSON object: seconds and peak memory of the export, size of the artifact, seconds to
open it, and decoding beside the memory's read speed, measured before and after in the same run.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.roofline import Roofline, seconds
from rgexport.export.artifact import Artifact
from rgexport.griffin.state import POSITION, zero_state
from rgexport.progress import note
from rgexport.runtimes.engines import open_session
from rgexport.validate.environment import environment

FOLDER = Path("out/bench")
STEPS = 24
WARM_UP_SECONDS = 5
"""The session moves its weights into huge pages in the background, for some two seconds."""
START = "from rgexport.cli import main; main()"


def main() -> None:
    """Runs everything; what was made is kept for the next run, except the artifact."""
    size, precision = (*sys.argv[1:], *("2b", "int4")[len(sys.argv) - 1 :])
    FOLDER.mkdir(parents=True, exist_ok=True)
    checkpoint, target = FOLDER / f"{size}-random", FOLDER / f"{size}-{precision}"
    if not checkpoint.exists():
        command("random", "--size", size, "-o", checkpoint)
    asked = ("onnx", "-m", checkpoint, "--precision", precision, "-o", target, "--force")
    export = command(*asked)
    artifact = Artifact.open(target)
    result = {
        "size": size,
        "precision": precision,
        "environment": environment(),
        "export": export,
        "artifact_bytes": sum(record.size for record in artifact.manifest.files.values()),
        "decode": decode(artifact),
    }
    print(json.dumps(result, indent=1))


def command(*arguments: str | Path) -> dict[str, float]:
    """Runs rgexport in a process of its own; its wall time and peak memory."""
    note(f"rgexport {' '.join(map(str, arguments))}")
    start = time.perf_counter()
    program = [sys.executable, "-c", START, *map(str, arguments)]
    with subprocess.Popen(program, stdout=sys.stderr) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(usage)}


def peak_bytes(usage: resource.struct_rusage) -> int:
    """The peak memory of a process, whose unit depends on the system."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def decode(artifact: Artifact) -> dict[str, Any]:
    """Steps at a depth beyond the window, between two measurements of the read speed."""
    config, sessions = artifact.manifest.config, []
    opening = seconds(lambda: sessions.append(open_session(artifact)))
    session = sessions[0]
    activation = session.info.activation_dtype
    deep = zero_state(config, 1, activation) | {POSITION: np.full(1, 2 * config.window)}
    session.set_state(deep)
    token = np.ones(1, np.int64)
    warm = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < warm:
        session.step(token)

    roofline = Roofline(session.info.threads)
    before = roofline.best()
    steps = [seconds(lambda: session.step(token)) for _ in range(STEPS)]
    after = roofline.best()
    read = session.info.weight_bytes + session.info.state_bytes
    return {
        "engine": f"{session.info.engine} {session.info.engine_version}",
        "threads": session.info.threads,
        "open_seconds": opening,
        "step_seconds": statistics.median(steps),
        "bytes_per_step": read,
        "read_bytes_per_second": [before, after],
        "share_of_roofline": read / statistics.median(steps) / max(before, after),
        "peak_bytes": peak_bytes(resource.getrusage(resource.RUSAGE_SELF)),
    }


if __name__ == "__main__":
    main()
