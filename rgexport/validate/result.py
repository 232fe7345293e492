"""The result of `validate`: measured values, checks and verdicts."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.card import matrix_bits
from rgexport.artifacts.manifest import Manifest, arithmetic
from rgexport.artifacts.manifest_reader import is_artifact
from rgexport.choices import GradeName
from rgexport.errors import RequestError
from rgexport.files.typed_json import to_json
from rgexport.runtimes.session import SessionInfo
from rgexport.validate import checks as checking
from rgexport.validate.bisect.site_report import SiteReport
from rgexport.validate.bisect.suspects import Suspect
from rgexport.validate.continuations import Continuation
from rgexport.validate.costs import LayerCost, RoundingCost
from rgexport.validate.equivalences import SAME, Equivalence
from rgexport.validate.formats.expected import expected_of
from rgexport.validate.identity import IdentityItem, identity_checks
from rgexport.validate.measure import Comparison
from rgexport.validate.metrics import Drift, worst
from rgexport.validate.reference.against import AgainstFile, file_checks
from rgexport.validate.source import OriginalModel
from rgexport.validate.structure.compare import NOT_COMPARED, StructureReport
from rgexport.validate.weights.weight_errors import WeightError
from rgexport.validate.weights.weight_limits import Reproduced, reproduced_checks, weight_checks

Scope = Literal["structure", "text"]
SCHEMA_VERSION = 2
"""Goes up when a field changes its meaning or goes away, not when one is added."""


@dataclass(frozen=True)
class ArtifactInfo:
    """The artifact that was validated."""

    path: str
    name: str
    kind: str
    precision: str
    compute: str
    exact: bool
    rounds_activations: bool
    window: int
    files: dict[str, str]
    """File → SHA-256."""
    bytes: int
    bits_per_weight: float
    """With scales, zero points and tables."""
    matrix_bits_per_weight: float
    """The same for the matrices and the embedding, which is the head, alone."""

    @property
    def numbers(self) -> str:
        """The precision of weights and arithmetic in words."""
        text = arithmetic(self.precision, self.compute, self.rounds_activations)
        if self.exact and expected_of(self.kind).has_exact:
            text += ", exact"
        return text


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


@dataclass(frozen=True, kw_only=True, repr=False)
class ValidationResult:
    """The outcome of `validate`; `to_dict` is its stable JSON.

    `dequantized` is the comparison with the dequantized reference (`twin` is its former name).
    `original` is None without an original, and `sites` where the engine does not show its values.
    `weights`, `cost` and `layers` need the original; `reproduced`, `layers` and `suspects` are null
    unless they were asked for, `continuations` without a tokenizer, or without both a reference
    file and a small original. `min_quality` is the grade that was asked for.
    """

    artifact: ArtifactInfo
    source: SourceInfo
    text: TextInfo
    engine: SessionInfo
    dequantized: Comparison
    original: Comparison | None
    equivalences: dict[str, Equivalence]
    sites: SiteReport | None
    weights: list[WeightError] | None
    cost: RoundingCost | None
    reproduced: list[Reproduced] | None
    layers: list[LayerCost] | None
    suspects: list[Suspect] | None
    reference: AgainstFile | None
    tolerance: checking.Tolerance
    checks: list[checking.Check]
    environment: dict[str, str | int]
    continuations: list[Continuation] | None = None
    min_quality: GradeName | None = None
    structure: StructureReport = NOT_COMPARED
    identity: tuple[IdentityItem, ...] = ()

    def __repr__(self) -> str:
        quality_text = ""
        if self.quality is not None:
            quality_text = f", {self.quality.grade}, KL {self.quality.kl:.3g}"
        return f"<{type(self).__name__} {self.artifact.path}: {self.verdict}{quality_text}>"

    @property
    def verdict_scope(self) -> Scope:
        """Whether a PASS holds for every input (`structure`), or for the text that was run."""
        return "structure" if self.structure.in_verdict else "text"

    @property
    def verdict(self) -> checking.Outcome:
        """The worst outcome of all checks."""
        return checking.verdict(self.checks)

    @property
    def quality(self) -> checking.Quality | None:
        """The grade by the original or, without one, by a reference file."""
        original = self.original
        if original is not None:
            tokens = self.text.tokens
            return checking.grade_quality("original", original.kl, original.agreement, tokens)
        file = self.reference
        if file is not None:
            return checking.grade_quality("reference", file.kl, file.agreement, file.positions)
        return None

    @property
    def good_enough(self) -> bool:
        """Whether the quality reaches the grade that was asked for, if any."""
        if self.min_quality is None:
            return True
        quality = self.quality
        return quality is not None and quality.reaches(self.min_quality)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON; numbers that are not finite become null."""
        fields = {f.name: to_json(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for entry, check in zip(fields["checks"], self.checks, strict=True):
            entry |= {"outcome": check.outcome, "passed": check.passed}
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "verdict_scope": self.verdict_scope,
            "quality": to_json(self.quality),
            **fields,
            "twin": fields["dequantized"],
        }


def require_writable(path: Path) -> None:
    """Raises RequestError, before the work, for a report that `write_text` could not write.

    A report inside an artifact is refused, too.
    """
    folder = path.absolute().parent
    if path.is_dir():
        _refuse_folder(path, "it is a folder")
    if not folder.is_dir():
        _refuse_folder(path, f"there is no folder {path.parent}")

    written = folder  # a new file takes a permission of its folder
    if path.exists():
        written = path
    if not os.access(written, os.W_OK):
        raise RequestError(f"cannot write {path}: permission denied; choose another place")

    real_path = Path(os.path.realpath(path))
    if any(map(is_artifact, real_path.parents)):
        raise RequestError(f"cannot write {path}: it lies in an artifact; choose another place")


def _refuse_folder(path: Path, reason: str) -> NoReturn:
    raise RequestError(f"cannot write {path}: {reason}; expected a file in an existing folder")


def as_json(results: Sequence[ValidationResult]) -> str:
    """Returns one result as a JSON object, several as a list."""
    values = [result.to_dict() for result in results]
    value: Any = values
    if len(values) == 1:
        value = values[0]
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def describe_artifact(path: Path, artifact: Artifact) -> ArtifactInfo:
    """Returns the artifact's part of a result; `path` is the one that the user gave."""
    manifest = artifact.manifest
    stored_bytes = 0
    weights = 0
    for tensor in manifest.tensors.values():
        stored_bytes += sum(part.nbytes for part in tensor.parts.values())
        weights += math.prod(tensor.shape)
    return ArtifactInfo(
        path=str(path),
        name=manifest.name,
        kind=manifest.kind,
        precision=manifest.precision,
        compute=manifest.compute,
        exact=manifest.exact,
        rounds_activations=manifest.rounds_activations,
        window=manifest.config.window,
        files={name: record.sha256 for name, record in manifest.files.items()},
        bytes=artifact.nbytes,
        bits_per_weight=8 * stored_bytes / weights,
        matrix_bits_per_weight=matrix_bits(manifest),
    )


def describe_source(name: str, original: OriginalModel | None) -> SourceInfo:
    """Returns the original's part of a result; `name` is that of the manifest."""
    if original is None:
        return SourceInfo(name, found=False)
    return SourceInfo(
        made_from=name,
        found=True,
        path=str(original.checkpoint.path),
        same_files=original.same_files,
        config_differences=original.config_differences,
    )


def all_checks(
    result: ValidationResult, manifest: Manifest, counted: bool, limits: Mapping[str, float]
) -> Iterator[checking.Check]:
    """Yields all checks; `limits` are those that the user set."""
    tolerance = result.tolerance.at(result.text.tokens)
    yield from checking.logit_checks(result.dequantized.logits, tolerance)
    yield _state_check(result)
    reason = "the session counts every token"
    yield checking.Check(name="position", value=float(not counted), limit=0, reason=reason)
    yield from _equivalence_checks(result)
    if result.structure.in_verdict:
        differs = float(result.structure.status == "differs")
        reason = result.structure.reason
        yield checking.Check(name="structure", value=differs, limit=0, reason=reason)
    if result.sites is not None:
        yield from _site_checks(result.sites)
    if result.original is not None:
        original = result.original
        yield from checking.cost_checks("original", manifest, original.logits, original.kl, limits)
    if result.weights is not None:
        yield from weight_checks(result.weights)
    if result.reproduced is not None:
        yield from reproduced_checks(result.reproduced)
    yield from _rounding_checks(result)
    if result.reference is not None:
        yield from _reference_checks(result, result.reference, manifest, limits)
    yield from identity_checks(result.identity)


def _state_check(result: ValidationResult) -> checking.Check:
    """Returns the check of the states at the position where they are nearest to their limit."""
    end = Drift(position=result.text.tokens, states=result.dequantized.states)
    checks = []
    for drift in (*result.dequantized.drift, end):
        check = checking.Check(
            name="dequantized.states",
            value=worst(drift.states),
            limit=result.tolerance.at(drift.position).states,
            reason=f"after {drift.position} tokens; {result.tolerance.reason}",
        )
        checks.append(check)
    return max(checks, key=lambda check: check.excess)


def _equivalence_checks(result: ValidationResult) -> Iterator[checking.Check]:
    side = result.dequantized
    states = list(side.states)
    for drift in side.drift:
        states += drift.states
    limit = checking.consistency(
        result.tolerance, result.text.tokens, side.logits.relative_max, worst(states)
    )
    for name, equivalence in result.equivalences.items():
        reason = f"{SAME[name]}; {limit.reason}"
        yield checking.Check(
            name=f"{name}.logits",
            value=equivalence.logits.relative_max,
            limit=limit.logits,
            reason=reason,
            kind=name,
        )
        if equivalence.states:
            yield checking.Check(
                name=f"{name}.states",
                value=worst(equivalence.states),
                limit=limit.states,
                reason=reason,
                kind=name,
            )


def _site_checks(report: SiteReport) -> Iterator[checking.Check]:
    """Yields all ops beyond their limits, or the op that is nearest to its limit."""
    for error in report.beyond or report.worst(1):
        yield checking.Check(
            name=f"sites.{error.state or error.site}",
            value=error.excess,
            limit=1.0,
            reason=f"{error.op} of {error.call} from the artifact's own inputs, in limits",
            kind="sites",
        )


def _rounding_checks(result: ValidationResult) -> Iterator[checking.Check]:
    cost = result.cost
    if cost is None:
        return
    ratios = {}
    if cost.ratio is not None:
        ratios["original"] = cost.ratio
    if result.reference is not None:
        # The file has logits of other texts, and of the artifact's own arithmetic.
        kl = result.reference.kl
        least_kl = kl.mean - checking.STANDARD_ERRORS * kl.standard_error
        ratios["reference"] = least_kl / (cost.kl_rounded + result.dequantized.kl.mean)
    for side, ratio in ratios.items():
        yield checking.Check(
            name=f"cost.{side}",
            value=ratio,
            limit=checking.MOST_COST[side],
            reason="KL in units of what rounding costs at random, by the steps of the weights",
            kind="cost",
        )


def _reference_checks(
    result: ValidationResult,
    file: AgainstFile,
    manifest: Manifest,
    limits: Mapping[str, float],
) -> Iterator[checking.Check]:
    asked_for = any(item.outcome == "asked for" for item in result.identity)
    for check in file_checks(file, manifest, limits):
        # Logits with another window, which the export was asked for, are no fault.
        if asked_for and check.name == "reference.rms" and file.config_differences:
            continue
        yield check
