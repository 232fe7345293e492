"""What a token costs after many others, by `rgexport bench`: the demo and a 2B."""

import argparse
import json
import subprocess
import sys
from typing import Any

from bench.onnx_models import STORAGES, make_missing
from bench.run import FOLDER, START, command

DEMO = FOLDER / "demo-int4-onnx"
DEPTHS = "0,2048,4096,16384,131072"
DEMO_TOKENS, DEMO_ROUNDS = 64, 41
SHORTER = 4
"""So many times shorter are turns than those of other tests, and so many times more: a hundredth is
looked for, on machines whose speed changes by a tenth while they run."""


def depths(options: argparse.Namespace) -> dict[str, Any]:
    """Rows of `rgexport bench`: the demo after processed tokens, a 2B after a synthetic state."""
    storage = STORAGES[options.models[0]]
    make_missing([storage])
    command("onnx", "--size", "demo", "--int4", "--no-check", "-o", DEMO, "--force")
    demo = _rows(DEMO, "-n", DEMO_TOKENS, "-r", DEMO_ROUNDS)
    tokens, rounds = max(1, options.tokens // SHORTER), options.rounds * SHORTER
    large = _rows(storage.artifact, "-n", tokens, "-r", rounds, "--synthetic")
    return {"demo": demo, "2b": large, "label": storage.label}


def _rows(*asked: Any) -> list[dict[str, Any]]:
    words = "bench", *asked, "-p", "0", "-d", DEPTHS, "-o", "json"
    program = [sys.executable, "-c", START, *map(str, words)]
    return list(json.loads(subprocess.run(program, stdout=subprocess.PIPE, check=True).stdout))
