"""Compares what a user sees of this checkout with an earlier one's.

    python -m bench.compatibility BASE [--output FOLDER]

BASE is a checkout of an earlier commit, with its native libraries. Both export the demo and two
random checkpoints of odd shapes in all formats, read the artifacts, and are given wrong requests.
Compared are the commands and their options, exit codes and error lines, every byte of the
artifacts, and the fields of all JSON output. Prints each difference; exit code 1 if there are any.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[1]
SEEDS = 0, 3  # of two odd shapes, one with rows that K-quants fit
EXPORTS = {
    "onnx-fp32": ["onnx", "--precision", "fp32"],
    "onnx-fp16": ["onnx", "--precision", "fp16"],
    "onnx-int8": ["onnx", "--int8"],
    "onnx-int4": ["onnx", "--int4"],
    "onnx-int4-128": ["onnx", "--int4", "--block-size", "128", "--asymmetric"],
    "onnx-int4-fast": ["onnx", "--int4", "--quality", "fast", "--exact"],
    "onnx-wasm": ["onnx", "--profile", "wasm"],
    "onnx-webgpu": ["onnx", "--profile", "webgpu"],
    "coreml-int4": ["coreml", "--int4"],
    "coreml-pal4": ["coreml", "--precision", "pal4", "--recurrent-state", "hilo"],
    "coreml-fp16": ["coreml", "--precision", "fp16", "--all-logits"],
    "f16.gguf": ["gguf", "--type", "f16"],
    "q4_0.gguf": ["gguf", "--type", "q4_0"],
    "q4_k_m.gguf": ["gguf", "--int4"],
}
VALIDATED = "onnx-int4", "coreml-int4", "q4_0.gguf"
WRONG = [
    *(["onnx"], ["onnx", "-m", "nowhere"], ["onnx", "--size", "3b"], ["onnx", "--int5"]),
    *(["gguf", "-m", "{model}", "--type", "q9"], ["coreml", "-m", "{model}", "--split", "x"]),
    ["onnx", "-m", "{model}", "--block-size", "24", "-o", "x"],
    ["onnx", "-m", "{model}", "--int4", "--int8", "-o", "x"],
    ["onnx", "-m", "{model}", "--window", "0", "-o", "x"],
    ["onnx", "-m", "{model}", "--plan", "nowhere.json", "-o", "x"],
    ["onnx", "-m", "{model}", "--int4", "-o", "{model}"],
    *(["validate"], ["validate", "nowhere"], ["validate", "{model}"], ["chat", "nowhere"]),
    *(["generate", "{artifact}", "-p", "x"], ["inspect", "nowhere"], ["evaluate", "nowhere"]),
    *(["serve", "nowhere"], ["bench", "nowhere"], ["quantize"], ["push", "nowhere", "a/b"]),
    ["validate", "{artifact}", "--limit", "nothing=1"],
    ["validate", "{artifact}", "--reference", "{model}"],
    ["state", "save", "{artifact}", "nowhere.txt", "x"],
]
OPTIONS = """
import click, json
from rgexport.cli import rgexport
def tree(command, name):
    yield from ((f"{name} {'/'.join(p.opts)}", repr((p.opts, p.secondary_opts, p.nargs, p.multiple,
        p.required, getattr(p.type, 'choices', None), p.default))) for p in command.params)
    for key, inner in getattr(command, 'commands', {}).items():
        yield from tree(inner, f"{name} {key}")
print(json.dumps(dict(tree(rgexport, "rgexport"))))
"""
"""A program that prints the parameters of every command."""


def main() -> int:
    """Compares the two checkouts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out/bench/compatibility"))
    options = parser.parse_args()
    checkpoints = {"demo": ROOT / "demo" / "model"}
    for seed in SEEDS:
        checkpoints[f"odd-{seed}"] = folder = options.output.resolve() / f"odd-{seed}"
        if not folder.exists():
            write_checkpoint(seed, folder)
    before, after = (
        observe(tree.resolve(), options.output.resolve() / name, checkpoints)
        for name, tree in (("before", options.base), ("after", ROOT))
    )
    names = [name for name in (before | after) if before.get(name) != after.get(name)]
    for name in names:
        print(f"{name}\n  before: {before.get(name)}\n  after:  {after.get(name)}")
    print(f"{len(names)} of {len(before | after)} observations differ")
    return bool(names)


def observe(tree: Path, folder: Path, checkpoints: dict[str, Path]) -> dict[str, str]:
    """Observes a checkout: a name for each observation, and its value."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(tree)}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *command]
        return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)

    observations: dict[str, str] = json.loads(run("-c", OPTIONS).stdout)

    def rgexport(name: str, *arguments: str) -> str:
        done = run("-c", "from rgexport.cli import main; main()", *arguments)
        observations[f"{name}: exit code"] = str(done.returncode)
        if done.returncode == 2:
            message = done.stderr.strip().splitlines()[-1]
            observations[f"{name}: error"] = message.replace(str(folder), "FOLDER")
        return done.stdout

    for model, checkpoint in checkpoints.items():
        for kind, command in EXPORTS.items():
            artifact, name = folder / f"{model}-{kind}", f"{model} {kind}"
            output = ("-m", str(checkpoint), "--no-check", "--force", "-o", str(artifact))
            rgexport(name, *command, *output)
            if artifact.exists():
                observations |= {f"{name}: {file}": digest for file, digest in hashes(artifact)}
                shown = rgexport(f"{name} inspect", "inspect", "--json", str(artifact))
                observations[f"{name} inspect: fields"] = fields(json.loads(shown))
            if artifact.exists() and kind in VALIDATED:
                report = folder / "report.json"
                judged = ("--tokens", "40", "--json", str(report))
                rgexport(
                    f"{name} validate", "validate", str(artifact), "-m", str(checkpoint), *judged
                )
                result = json.loads(report.read_text())
                observations[f"{name} validate: fields"] = fields(result)
                checks = {check["name"]: check["passed"] for check in result["checks"]}
                observations[f"{name} validate: checks"] = str(checks)
    first = str(folder / f"odd-{SEEDS[0]}-onnx-int4")
    filled = {"model": str(checkpoints["demo"]), "artifact": first}
    for arguments in WRONG:
        rgexport(" ".join(arguments), *(word.format(**filled) for word in arguments))
    return observations


def hashes(artifact: Path) -> Iterator[tuple[str, str]]:
    """Yields each file's name and hash."""
    for path in sorted(artifact.rglob("*")) if artifact.is_dir() else [artifact]:
        if path.is_file():
            name = path.relative_to(artifact.parent).as_posix()
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def fields(value: Any) -> str:
    """Lists the paths of all keys; elements of a list count once."""
    return ", ".join(sorted(set(_paths(value))))


def _paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, f"{path}[]")
    else:
        yield path


if __name__ == "__main__":
    sys.exit(main())
