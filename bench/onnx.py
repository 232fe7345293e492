"""Our kernels beside stock ONNX Runtime's, llama.cpp's and oneDNN's, in one run.

    python -m bench.onnx [decode prefill op depth] [--models int4-128 …] [--rounds 5]

A random 2B in int4 and int8, with and without the native kernels, takes turns with stock
`llama-bench` on a transformer of Gemma 2B's shape, all Q4_0; between the turns stand measurements
of the memory's read speed, by numpy and by a C program. `op` is one quantized linear alone, beside
oneDNN's int8 product through torch; `depth` is what a token costs after many others. Each part
leaves its figures in `out/bench/onnx/`; the page `out/bench/onnx.md` shows all of them. A machine
is rarely left alone for long: models that were not asked for keep what an earlier run on the same
machine with the same versions found.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.onnx_depth import depths
from bench.onnx_models import STORAGES
from bench.onnx_op import op_alone
from bench.onnx_page import PARTS, write_page
from bench.onnx_turns import take_turns
from bench.run import FOLDER
from rgexport.progress import note
from rgexport.runtimes.machine import environment

RESULTS = FOLDER / "onnx"
MEASURE: dict[str, Callable[[argparse.Namespace], Any]] = {
    "decode": lambda options: take_turns("tg", options.tokens, options),
    "prefill": lambda options: take_turns("pp", options.prompt, options),
    "op": op_alone,
    "depth": depths,
}


def main() -> None:
    """Measures the parts that were asked for, and writes the page of all that is known."""
    options = _parser().parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        found = {
            "environment": environment(),
            "load_average": os.getloadavg(),
            "found": MEASURE[part](options),
        }
        file = RESULTS / f"{part}.json"
        earlier = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(joined(earlier, found), indent=1) + "\n")
    files = {part: RESULTS / f"{part}.json" for part in PARTS}
    write_page({p: json.loads(f.read_text()) for p, f in files.items() if f.exists()}, FOLDER)
    note(f"{FOLDER / 'onnx.md'} is complete")


def joined(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was found, with the models that were measured earlier, in the same way."""
    new, old = found["found"], earlier.get("found", {})
    same = earlier.get("environment") == found["environment"]
    if not same or "models" not in new or new["test"] != old.get("test"):
        return found
    models = {name: new["models"].get(name) or old["models"].get(name) for name in STORAGES}
    return found | {"found": new | {"models": {name: m for name, m in models.items() if m}}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, by default")
    parser.add_argument("--models", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="single tokens of a turn")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tools", type=Path, default=Path("out/llama/bin"))
    return parser


if __name__ == "__main__":
    main()
