"""Validates artifacts of many sound checkpoints: none may fail.

    python -m bench.sweep [--seeds 20] [--first 0] [--formats onnx …] [--precisions int4 …] [--demo]

Each seed is a random checkpoint of a random shape (see `bench.checkpoints`), exported in every
format and precision, and validated as `rgexport validate` does it, with the model and with a
reference file of it. Prints a table for each format:
how many artifacts there were, how many failed, and how near each check came to its limit, as a
share of it. Each run is also appended to `out/bench/sweep.jsonl`. Exit code 1 if any failed.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.checkpoints import write_checkpoint
from bench.run import FOLDER
from rgexport.export.coreml.exporter import export_coreml
from rgexport.export.coreml.options import CoreMLOptions
from rgexport.export.gguf.exporter import export_gguf
from rgexport.export.gguf.options import GgufOptions
from rgexport.export.onnx.exporter import export_onnx
from rgexport.export.onnx.profiles import OnnxOptions
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.config import DEMO
from rgexport.progress import note
from rgexport.reporting.tables import Table, render
from rgexport.validate.opening import ValidationRequest
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import ReferenceFile, read_reference
from rgexport.validate.run import validate_artifact

TOKENS = 300
"""The most that an artifact takes; random checkpoints get four windows."""
PREFILL = 16
"""Tokens of a Core ML package's prefill function: shorter than most windows."""
SHOWN = 4
"""Failed checks of one artifact that are printed."""
LOG = FOLDER / "sweep.jsonl"

Export = Callable[[Checkpoint, Path], Path]


def _onnx(**options: Any) -> Export:
    return lambda checkpoint, target: export_onnx(checkpoint, OnnxOptions(**options), target)


def _coreml(**options: Any) -> Export:
    asked = CoreMLOptions(prefill_length=PREFILL, **options)
    return lambda checkpoint, target: export_coreml(checkpoint, asked, target)


def _gguf(kind: str) -> Export:
    return lambda checkpoint, target: export_gguf(checkpoint, GgufOptions(type=kind), target)


UNIFORM: dict[str, Any] = {
    "precision": "int4",
    "block_size": 128,
    "symmetric": False,
    "embedding_precision": "int4",
}
"""Four bits everywhere, with zero points."""
EXPORTS: dict[str, dict[str, Export]] = {
    "onnx": {
        **{word: _onnx(precision=word) for word in ("fp32", "fp16", "int8", "int4")},
        "int4-128": _onnx(**UNIFORM),
        "int4-exact": _onnx(precision="int4", exact=True),
        "int4-fp16": _onnx(precision="int4", compute="fp16"),
    },
    "coreml": {
        **{word: _coreml(precision=word) for word in ("fp32", "fp16", "int8", "int4", "pal4")},
        "int4-fp32": _coreml(precision="int4", compute="fp32"),
        "fp16-hilo": _coreml(precision="fp16", recurrent_state="hilo"),
    },
    "gguf": {
        kind: _gguf(kind)
        for kind in ("f32", "f16", "bf16", "q8_0", "q5_1", "q4_0", "q4_k_m", "q3_k_m", "q2_k")
    },
}
"""Format → precision → how it is exported."""


@dataclass(frozen=True)
class Run:
    """One artifact's verdict, and name → value / limit of its checks (the worst of a name)."""

    model: str
    format: str
    precision: str
    verdict: str
    failed: tuple[str, ...]
    shares: dict[str, float]


def main() -> None:
    """Runs everything and prints the tables."""
    options = _parser().parse_args()
    LOG.parent.mkdir(parents=True, exist_ok=True)
    runs = []
    with LOG.open("a") as log:
        for run in sweep(options):
            log.write(json.dumps(asdict(run)) + "\n")
            log.flush()
            note(f"{run.model}, {run.format} {run.precision}: {run.verdict}")
            runs.append(run)
    print(render([*map(_table, options.formats, [runs] * len(options.formats)), *_failures(runs)]))
    sys.exit(any(run.verdict != "PASS" for run in runs))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    precisions = sorted({word for exports in EXPORTS.values() for word in exports})
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--formats", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--demo", action="store_true", help="the demo model too")
    return parser


def sweep(options: argparse.Namespace) -> Iterator[Run]:
    """All runs that were asked for; nothing of them is kept on the disk."""
    for seed in range(options.first, options.first + options.seeds):
        with TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            character = write_checkpoint(seed, model)
            yield from _runs(f"{seed} ({character})", open_checkpoint(model), options)
    if options.demo:
        yield from _runs(DEMO, open_checkpoint(size=DEMO), options)


def _runs(name: str, checkpoint: Checkpoint, options: argparse.Namespace) -> Iterator[Run]:
    with TemporaryDirectory() as folder:
        with redirect_stderr(io.StringIO()):
            reference = read_reference(capture(checkpoint, Path(folder) / "reference"))
        yield from _exported(name, checkpoint, reference, options)


def _exported(
    name: str, checkpoint: Checkpoint, reference: ReferenceFile, options: argparse.Namespace
) -> Iterator[Run]:
    for kind in options.formats:
        for precision, export in EXPORTS[kind].items():
            if precision in options.precisions:
                yield _validate(name, checkpoint, reference, kind, precision, export)


def _validate(
    name: str,
    checkpoint: Checkpoint,
    reference: ReferenceFile,
    kind: str,
    precision: str,
    export: Export,
) -> Run:
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        os.environ["RGEXPORT_CACHE"] = folder  # what is known of these files is of no use later
        suffix = ".gguf" if kind == "gguf" else ""
        target = export(checkpoint, Path(folder) / f"artifact{suffix}")
        model = str(checkpoint.path)
        result = validate_artifact(
            target, ValidationRequest(model=model, reference=reference, max_tokens=TOKENS)
        )
    shares: dict[str, float] = {}
    for check in result.checks:
        share, asked = check.value / (check.limit or 1), check.kind or check.name
        shares[asked] = max(share, shares.get(asked, 0.0))
    failed = tuple(
        f"{check.name} {check.value:.3g} > {check.limit:.3g}"
        for check in result.checks
        if not check.passed
    )
    return Run(name, kind, precision, result.verdict, failed, shares)


def _table(kind: str, runs: list[Run]) -> Table:
    found = {
        word: [run for run in runs if (run.format, run.precision) == (kind, word)]
        for word in EXPORTS[kind]
    }
    columns = {word: of_word for word, of_word in found.items() if of_word}
    checks = sorted({check for of in columns.values() for run in of for check in run.shares})
    rows = [
        ("artifacts", *(str(len(of)) for of in columns.values())),
        ("not PASS", *(str(sum(run.verdict != "PASS" for run in of)) for of in columns.values())),
        *((check, *(_largest(of, check) for of in columns.values())) for check in checks),
    ]
    return Table(f"{kind}: largest value / limit of each check", ("", *columns), rows, columns)


def _largest(runs: list[Run], check: str) -> str:
    shares = [run.shares[check] for run in runs if check in run.shares]
    return f"{max(shares):.2f}" if shares else ""


def _failures(runs: list[Run]) -> Iterator[str]:
    for run in runs:
        if run.verdict != "PASS":
            told = ", ".join(run.failed[:SHOWN]) + ", …" * (len(run.failed) > SHOWN)
            yield f"{run.model}, {run.format} {run.precision}: {run.verdict}, {told}"


if __name__ == "__main__":
    main()
