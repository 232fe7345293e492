"""RecurrentGemma in llama.cpp beside the transformer that people would run instead, in one run.

    python -m bench.llama [--tools out/llama/bin] [--recurrent FILE] [--transformer FILE]

Both are 2B, all Q4_0, with random weights. Stock `llama-bench`, built from the patched tree, times
single tokens of each in turn; between the runs stands a measurement of the memory's read speed,
which drifts. Then both are timed at depths down to 32,768 tokens. What was found goes to
`out/bench/llama.json`, and from there to `out/bench/llama_cpp.md`.
Nearly all of the time goes into reaching the depths; the states are kept, so that a second run on
a quieter machine takes minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gemma_shape import write_gemma
from bench.llama_page import write_page
from bench.run import FOLDER, START, command
from rgexport.progress import note
from rgexport.runtimes.bench.roofline import ReadSpeed, roofline
from rgexport.runtimes.machine import environment, peak_bytes

MODELS = "recurrent", "transformer"
DEPTHS = "0,2048,4096,8192,16384,32768"
PROCESSED = {"recurrent": "32768", "transformer": "16384"}
"""The most tokens that are processed; a deeper state is made by doubling one."""
ANY_GGUF = "-m", "bench.any_gguf"
RESULT = FOLDER / "llama.json"


def main() -> None:
    """Makes what is missing, measures, and writes the page."""
    options = _parser().parse_args()
    files = {name: getattr(options, name) for name in MODELS}
    make_missing(files)
    reach(files, options.depths)
    threads = int(environment()["cores"])
    load_average = os.getloadavg()
    bench = LlamaBench(options.tools / "llama-bench", threads, options.tokens)
    with roofline(threads) as read_speed, roofline(threads, huge=False) as small_pages:
        result = {
            "environment": environment(),
            "threads": threads,
            "load_average": load_average,
            "files": {name: path.name for name, path in files.items()},
            "decode": decode(bench, files, options.rounds, read_speed, small_pages),
        }
    result["depths"] = sweep(files, options.depths)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_page(result, FOLDER)
    note(f"{FOLDER / 'llama_cpp.md'} is complete")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tools", type=Path, default=Path("out/llama/bin"))
    parser.add_argument("--recurrent", type=Path, default=FOLDER / "2b-q4_0.gguf")
    parser.add_argument("--transformer", type=Path, default=FOLDER / "gemma-2b-shape-q4_0.gguf")
    parser.add_argument("--depths", default=DEPTHS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    return parser


def make_missing(files: dict[str, Path]) -> None:
    """Makes the two files where they are not there yet."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not files["transformer"].exists():
        write_gemma(files["transformer"])
    if not files["recurrent"].exists():
        checkpoint = FOLDER / "2b-random"
        if not checkpoint.exists():
            command("random", "--size", "2b", "-o", checkpoint)
        asked = ("--type", "q4_0", "--pure", "--no-check", "-o", files["recurrent"])
        command("gguf", "-m", checkpoint, *asked)


class LlamaBench:
    """Stock llama-bench, timing single tokens, or a prompt, a few times after a warm-up."""

    def __init__(
        self, program: Path, threads: int, tokens: int, *, prompt: int = 0, repetitions: int = 2
    ) -> None:
        """Has it take `tokens` single tokens, or none and a prompt of `prompt` in one batch."""
        if not program.is_file():
            sys.exit(f"{program} is missing: make llama-tools")
        numbers = {"-t": threads, "-p": prompt, "-n": tokens, "-r": repetitions, "-ub": 512}
        options = [word for option in numbers.items() for word in map(str, option)]
        self._command = [str(program), *options, "-o", "json"]

    def __call__(self, model: Path) -> dict[str, Any]:
        """What it says about the model, its rates as `samples_ts`, and `peak_bytes`."""
        program = [*self._command, "-m", str(model)]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            shown = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(process.returncode)
        (found,) = json.loads(shown)
        kept = "build_commit", "model_type", "model_size", "model_n_params", "n_gen", "samples_ts"
        return {name: found[name] for name in kept} | {"peak_bytes": peak_bytes(usage)}


def decode(
    bench: LlamaBench,
    files: dict[str, Path],
    rounds: int,
    read_speed: ReadSpeed,
    small_pages: ReadSpeed,
) -> list[dict[str, Any]]:
    """Rounds of single tokens at depth 0: each model in llama-bench, ours in `rgexport bench`."""
    found = []
    for index in range(rounds):
        note(f"decode, round {index + 1} of {rounds}")
        entry: dict[str, Any] = {"huge_pages": [read_speed()], "small_pages": [small_pages()]}
        for name, path in files.items():
            entry[name] = bench(path)
            entry["huge_pages"].append(read_speed())
            entry["small_pages"].append(small_pages())
        entry["session"] = session_row(files["recurrent"])
        found.append(entry)
    return found


def sweep(files: dict[str, Path], depths: str) -> dict[str, list[dict[str, Any]]]:
    """Single tokens after others: one row for each depth."""
    rows = (_rows(*ANY_GGUF, "time", files[name], depths, PROCESSED[name]) for name in MODELS)
    return dict(zip(MODELS, rows, strict=True))


def reach(files: dict[str, Path], depths: str) -> None:
    """Processes the tokens, where the states are not there from another run."""
    for name, path in files.items():
        _run(*ANY_GGUF, "reach", path, depths, PROCESSED[name])


def session_row(model: Path) -> dict[str, Any]:
    """One row of `rgexport bench`."""
    asked = ("bench", model, "-p", "0", "-n", "64", "-r", "1", "-o", "json")
    return _rows("-c", START, *asked)[0]


def _rows(*arguments: str | Path) -> list[dict[str, Any]]:
    return list(json.loads(_run(*arguments)))


def _run(*arguments: str | Path) -> bytes:
    """What a Python program of ours prints."""
    program = [sys.executable, *map(str, arguments)]
    return subprocess.run(program, stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    main()
