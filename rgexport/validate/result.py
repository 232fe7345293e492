"""The outcome of `validate`: what was measured, what was demanded of it, and the verdict."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.export.manifest import Manifest
from rgexport.export.manifest_reader import is_artifact
from rgexport.runtimes.session import SessionInfo
from rgexport.validate import states, thresholds
from rgexport.validate.against import AgainstFile
from rgexport.validate.measure import Comparison, Equivalence, Measurement
from rgexport.validate.text import Text
from rgexport.validate.thresholds import Check, Tolerance
from rgexport.validate.weights import WeightError

SCHEMA_VERSION = 1
"""Goes up when a field changes its meaning or goes away, not when one is added."""


@dataclass(frozen=True)
class Subject:
    """The artifact in question."""

    path: str
    name: str
    kind: str
    precision: str
    compute: str
    exact: bool
    window: int
    files: dict[str, str]
    """File → SHA-256."""
    bytes: int
    """Of all files."""
    bits_per_weight: float
    """As stored, with what the quantization adds to them."""

    @property
    def numbers(self) -> str:
        """How it stores and computes; `exact` is worth a word where there is another way."""
        exact = ", exact" if self.exact and self.kind == "onnx" else ""
        return f"{self.precision} weights, {self.compute} activations{exact}"


@dataclass(frozen=True)
class SourceInfo:
    """The original that it was compared with; `found` is false where there was none."""

    made_from: str
    found: bool
    path: str | None = None
    same_files: bool | None = None
    config_differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextInfo:
    """The text, without its ids."""

    name: str
    tokens: int
    windows: float
    bytes: int | None
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything that `validate` has to say; `to_dict` is its stable JSON."""

    artifact: Subject
    source: SourceInfo
    text: TextInfo
    engine: SessionInfo
    twin: Comparison
    original: Comparison | None
    steps: Equivalence
    weights: list[WeightError] | None
    tolerance: Tolerance
    checks: list[Check]
    environment: dict[str, str | int]
    reference: AgainstFile | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """`PASS` or `FAIL`."""
        return "PASS" if self.passed else "FAIL"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; numbers that are not finite become null."""
        return _to_dict(self)


@dataclass(frozen=True, kw_only=True)
class FileResult:
    """What `validate` has to say where only a reference file is there, and no torch."""

    artifact: Subject
    engine: SessionInfo
    twin: None = None
    original: None = None
    reference: AgainstFile
    checks: list[Check]
    environment: dict[str, str | int]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """`PASS` or `FAIL`."""
        return "PASS" if self.passed else "FAIL"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; numbers that are not finite become null."""
        return _to_dict(self)


def _to_dict(result: Result | FileResult) -> dict[str, Any]:
    fields = _plain({f.name: getattr(result, f.name) for f in dataclasses.fields(result)})
    for entry, check in zip(fields["checks"], result.checks, strict=True):
        entry["passed"] = check.passed
    return {"schema_version": SCHEMA_VERSION, "verdict": result.verdict, **fields}


def require_writable(path: Path) -> None:
    """Refuses early what `write_text` would refuse at the end.

    Raises:
        RequestError: the folder is missing, read-only or in an artifact, which one more file
            would damage, or `path` is a folder.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise RequestError(f"cannot write {path}: {what}; expected a file in an existing folder")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise RequestError(f"cannot write {path}: permission denied; choose another place")
    if any(map(is_artifact, Path(os.path.realpath(path)).parents)):
        raise RequestError(f"cannot write {path}: it lies in an artifact; choose another place")


def write_json(results: Sequence[Result] | Sequence[FileResult], path: Path) -> None:
    """Writes a result to a file, or the list of several.

    Raises:
        RequestError: the file cannot be written.
    """
    found = [result.to_dict() for result in results]
    value = found if len(found) > 1 else found[0]
    write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), path)


def write_text(text: str, path: Path) -> None:
    """Writes UTF-8; of a path that is no text, the odd bytes become escapes, as JSON has them.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        path.write_text(text + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def make_checks(
    manifest: Manifest, measured: Measurement, weights: list[WeightError] | None
) -> Iterator[Check]:
    """What is demanded of an artifact: see `thresholds`."""
    limit = thresholds.tolerance(manifest)
    twin, steps, why = measured.twin, measured.steps, limit.reason
    for name, value, most in (
        ("twin.logits", twin.logits.relative_max, limit.logits),
        ("twin.rms", twin.logits.relative_rms, limit.rms),
        ("twin.states", states.worst(twin.states), limit.states),
        ("steps.logits", steps.logits.relative_max, limit.logits),
        ("steps.states", states.worst(steps.states), limit.states),
    ):
        yield Check(name=name, value=value, limit=most, reason=why)
    moved = float(not measured.same_position)
    yield Check(name="twin.position", value=moved, limit=0, reason="every token is counted")
    if measured.original is not None:
        storage = thresholds.coarsest(manifest)
        yield Check(
            name="original.rms",
            value=measured.original.logits.relative_rms,
            limit=thresholds.ORIGINAL_RMS[storage],
            reason=f"more than {storage} weights cost, unless the export is broken",
        )
    if weights is not None:
        yield from thresholds.weight_checks(weights)


def describe_artifact(path: Path, manifest: Manifest) -> Subject:
    """The artifact's part of a result."""
    return Subject(
        path=str(path),
        name=manifest.name,
        kind=manifest.kind,
        precision=manifest.precision,
        compute=manifest.compute,
        exact=manifest.exact,
        window=manifest.config.window,
        files={name: record.sha256 for name, record in manifest.files.items()},
        bytes=sum(record.size for record in manifest.files.values()),
        bits_per_weight=_bits_per_weight(manifest),
    )


def _bits_per_weight(manifest: Manifest) -> float:
    parts = [part for tensor in manifest.tensors.values() for part in tensor.parts.values()]
    weights = sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
    return 8 * sum(part.nbytes for part in parts) / weights


def describe_text(text: Text, window: int) -> TextInfo:
    """The text's part of a result."""
    count = len(text.tokens)
    return TextInfo(text.name, count, count / window, text.bytes, text.truncated)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
