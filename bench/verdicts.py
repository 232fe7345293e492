"""How wrong models fare: the table in docs/validation-checks.md.

    python -m bench.verdicts [-m MODEL] [--formats onnx …] [--trained-on FOLDER] [--docs FILE]

The sound model (by default the demo) is exported in all formats, and so is every wrong one of
`bench.wrong_models`; each artifact is held against the sound model in three ways: by a reference
file alone; with the model; and by the self-check. Prints a row for each; exit code 1 if a wrong one
passes anywhere, or a sound one does not. `--trained-on` is another trained checkpoint of the same
shape, such as `bench.trained_on` makes. Formats that are not asked for keep what an earlier run
found (`out/bench/verdicts.json`).
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.run import FOLDER
from bench.sweep import EXPORTS, Export
from bench.wrong_models import SPOILED, WRONG_WEIGHTS, Weights
from rgexport.griffin.checkpoint import Checkpoint, open_checkpoint
from rgexport.griffin.config import DEMO
from rgexport.griffin.huggingface import CONFIG, write_weights
from rgexport.griffin.huggingface_config import to_hugging_face
from rgexport.griffin.tensor import from_array
from rgexport.progress import note
from rgexport.reporting.tables import Table, render
from rgexport.validate.checks import Check
from rgexport.validate.opening import ValidationRequest
from rgexport.validate.reference.capture import capture
from rgexport.validate.reference.reference_file import ReferenceFile, read_reference
from rgexport.validate.run import validate_artifact
from rgexport.validate.self_check import self_check

TOKENS = 128
"""Of the built-in text, where the model is there."""
PRECISIONS = {
    "onnx": ("int8", "int4", "int4-128"),
    "coreml": ("int8", "int4"),
    "gguf": ("q8_0", "q4_0", "q4_k_m"),
}
FOUND = FOLDER / "verdicts.json"
MARK = "<!-- python -m bench.verdicts -->"
"""In the docs: the table stands between two of these."""


@dataclass(frozen=True)
class Verdict:
    """Of one artifact, in one way of asking: the check that is farthest beyond its limit."""

    wrong: str
    artifact: str
    way: str
    outcome: str
    check: str = ""
    factor: float = 0.0
    kl: float = 0.0


@dataclass(frozen=True)
class Judges:
    """The sound model, and what it said to some prompts."""

    sound: Checkpoint
    reference: ReferenceFile

    def judge(self, wrong: str, artifact: str, path: Path) -> Iterator[Verdict]:
        """All ways of asking."""
        label = partial(Verdict, wrong, artifact)
        alone = validate_artifact(path, ValidationRequest(reference=self.reference, max_tokens=16))
        assert alone.reference is not None
        yield label("reference", alone.verdict, *_deciding(alone.checks), alone.reference.kl.mean)
        both = validate_artifact(
            path, ValidationRequest(model=str(self.sound.path), max_tokens=TOKENS)
        )
        assert both.original is not None
        yield label("model", both.verdict, *_deciding(both.checks), both.original.kl.mean)
        record = self_check(self.sound, path)
        outcome = {"verified": "PASS", "unverified": "FAIL"}.get(record.status, record.status)
        yield label("self-check", outcome, record.reason)


def _deciding(checks: list[Check]) -> tuple[str, float]:
    """The name of the check that is farthest beyond its limit, and by what factor."""
    failed = [check for check in checks if not check.passed]
    if not failed:
        return "", 0.0
    worst = max(failed, key=lambda check: check.value / check.limit if check.limit else 1.0)
    return worst.name, worst.value / worst.limit if worst.limit else float("inf")


def verdicts(options: argparse.Namespace, folder: Path) -> Iterator[Verdict]:
    """Of all wrong models and of the sound one."""
    sound = open_checkpoint(options.model) if options.model else open_checkpoint(size=DEMO)
    reference = read_reference(capture(sound, folder / "reference"))
    judges = Judges(sound, reference)
    others = {name: partial(_write, sound, folder, name) for name in WRONG_WEIGHTS}
    if options.trained_on:
        others["another trained checkpoint"] = partial(open_checkpoint, options.trained_on)
    for kind in options.formats:
        for precision in PRECISIONS[kind]:
            export, artifact = EXPORTS[kind][precision], f"{kind} {precision}"
            yield from _judged(judges, "nothing", artifact, export, lambda: sound)
            for name, make in others.items():
                yield from _judged(judges, name, artifact, export, make)
            for name, spoil in SPOILED.items():
                yield from _judged(judges, name, artifact, export, lambda: sound, spoil)


def _judged(
    judges: Judges,
    wrong: str,
    artifact: str,
    export: Export,
    make: Callable[[], Checkpoint],
    spoil: Callable[[Path], None] | None = None,
) -> Iterator[Verdict]:
    """Exports one model, and asks about it."""
    with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        suffix = ".gguf" if artifact.startswith("gguf") else ""
        path = export(make(), Path(folder) / f"artifact{suffix}")
        if spoil:
            spoil(path)
        found = list(judges.judge(wrong, artifact, path))
    for verdict in found:
        note(f"{wrong}, {artifact}, {verdict.way}: {verdict.outcome} {verdict.check}")
        yield verdict


def _write(sound: Checkpoint, folder: Path, wrong: str) -> Checkpoint:
    """A wrong model as a checkpoint, written once."""
    target = folder / f"model-{list(WRONG_WEIGHTS).index(wrong)}"
    if not target.exists():
        weights: Weights = {
            name: tensor.whole().astype("float32") for name, tensor in sound.weights.items()
        }
        weights |= WRONG_WEIGHTS[wrong](sound.config, weights)
        target.mkdir()
        (target / CONFIG).write_text(json.dumps(to_hugging_face(sound.config, "block_types")))
        write_weights(target, {name: from_array(values) for name, values in weights.items()})
    return open_checkpoint(target)


def table(found: list[Verdict]) -> Table:
    """A row for each wrong model: the least that any artifact of it showed."""
    rows = []
    for wrong in dict.fromkeys(verdict.wrong for verdict in found):
        these = [verdict for verdict in found if verdict.wrong == wrong]
        kl = [verdict.kl for verdict in these if verdict.way == "reference"]
        cells = (_cell([v for v in these if v.way == way]) for way in _WAYS)
        rows.append((wrong, f"{min(kl):.2g} … {max(kl):.2g}", *cells))
    return Table("", ("what is wrong", "KL", *_WAYS.values()), rows)


_WAYS = {
    "reference": "reference file alone",
    "model": "with the model",
    "self-check": "self-check",
}
"""A way of asking → the heading of its column."""


def _cell(these: list[Verdict]) -> str:
    """All outcomes, and of the checks that decided, the one least beyond its limit."""
    outcomes = "/".join(sorted({verdict.outcome for verdict in these}))
    decided = [verdict for verdict in these if verdict.factor]
    if not decided:
        return outcomes
    least = min(decided, key=lambda verdict: verdict.factor)
    return f"{outcomes}, {least.factor:.3g} × ({least.check.rpartition('.')[2]})"


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-m", "--model", help="the sound model; by default the demo")
    parser.add_argument("--formats", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--trained-on", help="another trained checkpoint of the same shape")
    parser.add_argument("--docs", type=Path, help="a page to write the table into")
    options = parser.parse_args()
    found = _earlier(options.formats)
    with TemporaryDirectory() as folder:
        found += verdicts(options, Path(folder))
    FOUND.write_text(json.dumps([asdict(verdict) for verdict in found], indent=1))
    print(render([table(found)]))
    if options.docs:
        write_docs(options.docs, table(found))
    wrong = [v for v in found if (v.outcome == "PASS") != (v.wrong == "nothing")]
    for verdict in wrong:
        print(f"{verdict.wrong}, {verdict.artifact}, {verdict.way}: {verdict.outcome}")
    sys.exit(bool(wrong))


def _earlier(formats: list[str]) -> list[Verdict]:
    """What an earlier run found of the other formats."""
    FOUND.parent.mkdir(parents=True, exist_ok=True)
    found = (
        [Verdict(**fields) for fields in json.loads(FOUND.read_text())] if FOUND.exists() else []
    )
    return [verdict for verdict in found if verdict.artifact.split()[0] not in formats]


def write_docs(page: Path, found: Table) -> None:
    """Puts the table between the marks of a page."""
    before, _, after = page.read_text().split(MARK)
    lines = [found.header, ["---"] * len(found.header), *found.rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    page.write_text(f"{before}{MARK}\n\n{text}\n\n{MARK}{after}")


if __name__ == "__main__":
    main()
