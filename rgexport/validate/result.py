"""The result of `validate`: measured values, checks and verdicts."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.card import matrix_bits
from rgexport.artifacts.manifest import Manifest, arithmetic
from rgexport.artifacts.manifest_reader import is_artifact
from rgexport.choices import GradeName
from rgexport.errors import RequestError
from rgexport.files.typed_json import to_json
from rgexport.runtimes.session import SessionInfo
from rgexport.validate import checks as checking
from rgexport.validate.bisect.sites import SiteReport, Suspect
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
from rgexport.validate.weights.tensor_errors import WeightError
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
        exact = ", exact" if self.exact and expected_of(self.kind).has_exact else ""
        return arithmetic(self.precision, self.compute, self.rounds_activations) + exact


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
        quality = self.quality
        rest = f", {quality.grade}, KL {quality.kl:.3g}" if quality else ""
        return f"<{type(self).__name__} {self.artifact.path}: {self.verdict}{rest}>"

    @property
    def verdict_scope(self) -> Scope:
        """Whether a PASS holds for every input (`structure`), or for the text that was run."""
        return "structure" if self.structure.in_verdict else "text"

    @property
    def verdict(self) -> checking.Outcome:
        return checking.verdict(self.checks)

    @property
    def quality(self) -> checking.Quality | None:
        """The grade by the original or, without one, by a reference file."""
        if (side := self.original) is not None:
            return checking.grade_quality("original", side.kl, side.agreement, self.text.tokens)
        if (file := self.reference) is not None:
            return checking.grade_quality("reference", file.kl, file.agreement, file.positions)
        return None

    @property
    def good_enough(self) -> bool:
        least, quality = self.min_quality, self.quality
        return least is None or (quality is not None and quality.reaches(least))

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
    """Refuses what `write_text` would after the work, and artifacts, with a RequestError."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise RequestError(f"cannot write {path}: {what}; expected a file in an existing folder")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise RequestError(f"cannot write {path}: permission denied; choose another place")
    if any(map(is_artifact, Path(os.path.realpath(path)).parents)):
        raise RequestError(f"cannot write {path}: it lies in an artifact; choose another place")


def as_json(results: Sequence[ValidationResult]) -> str:
    values = [result.to_dict() for result in results]
    value = values if len(values) > 1 else values[0]
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


def describe_artifact(path: Path, artifact: Artifact) -> ArtifactInfo:
    manifest = artifact.manifest
    stored = [part for tensor in manifest.tensors.values() for part in tensor.parts.values()]
    weights = sum(math.prod(tensor.shape) for tensor in manifest.tensors.values())
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
        bits_per_weight=8 * sum(part.nbytes for part in stored) / weights,
        matrix_bits_per_weight=matrix_bits(manifest),
    )


def describe_source(name: str, original: OriginalModel | None) -> SourceInfo:
    if original is None:
        return SourceInfo(name, found=False)
    path, differences = str(original.checkpoint.path), original.config_differences
    return SourceInfo(name, True, path, original.same_files, differences)


def all_checks(
    result: ValidationResult, manifest: Manifest, counted: bool, limits: Mapping[str, float]
) -> Iterator[checking.Check]:
    """Yields all checks; `limits` are those that the user set."""
    side, limit, length = result.dequantized, result.tolerance, result.text.tokens
    yield from checking.logit_checks(side.logits, limit.at(length))
    states = []
    for at in (*side.drift, Drift(position=length, states=side.states)):
        value, most = worst(at.states), limit.at(at.position).states
        reason = f"after {at.position} tokens; {limit.reason}"
        states.append(
            checking.Check(name="dequantized.states", value=value, limit=most, reason=reason)
        )
    yield max(states, key=lambda check: check.excess)
    reason = "the session counts every token"
    yield checking.Check(name="position", value=float(not counted), limit=0, reason=reason)
    yield from _equivalence_checks(result)
    if result.structure.in_verdict:
        wrong = float(result.structure.status == "differs")
        yield checking.Check(name="structure", value=wrong, limit=0, reason=result.structure.reason)
    if (report := result.sites) is not None:
        for error in report.beyond or report.worst(1):
            name = f"sites.{error.state or error.site}"
            reason = f"{error.op} of {error.call} from the artifact's own inputs, in limits"
            yield checking.Check(
                name=name, value=error.excess, limit=1.0, reason=reason, kind="sites"
            )
    if result.original is not None:
        logits, kl = result.original.logits, result.original.kl
        yield from checking.cost_checks("original", manifest, logits, kl, limits)
    if result.weights is not None:
        yield from weight_checks(result.weights)
    if result.reproduced is not None:
        yield from reproduced_checks(result.reproduced)
    yield from _rounding_checks(result)
    if result.reference is not None:
        asked_for = any(item.outcome == "asked for" for item in result.identity)
        for check in file_checks(result.reference, manifest, limits):
            # Logits with another window, which the export was asked for, are no fault.
            of_another = check.name == "reference.rms" and result.reference.config_differences
            if not (asked_for and of_another):
                yield check
    yield from identity_checks(result.identity)


def _equivalence_checks(result: ValidationResult) -> Iterator[checking.Check]:
    side = result.dequantized
    states = worst([*side.states, *(error for at in side.drift for error in at.states)])
    limit = checking.consistency(
        result.tolerance, result.text.tokens, side.logits.relative_max, states
    )
    for name, same in result.equivalences.items():
        values = [("logits", same.logits.relative_max, limit.logits)]
        if same.states:
            values.append(("states", worst(same.states), limit.states))
        why = f"{SAME[name]}; {limit.reason}"
        for what, value, most in values:
            yield checking.Check(
                name=f"{name}.{what}", value=value, limit=most, reason=why, kind=name
            )


def _rounding_checks(result: ValidationResult) -> Iterator[checking.Check]:
    if (cost := result.cost) is None:
        return
    ratios = {} if cost.ratio is None else {"original": cost.ratio}
    if result.reference is not None:
        # The file has logits of other texts, and of the artifact's own arithmetic.
        kl = result.reference.kl
        least = kl.mean - checking.STANDARD_ERRORS * kl.standard_error
        ratios["reference"] = least / (cost.kl_rounded + result.dequantized.kl.mean)
    reason = "KL in units of what rounding costs at random, by the steps of the weights"
    for side, ratio in ratios.items():
        limit = checking.MOST_COST[side]
        yield checking.Check(
            name=f"cost.{side}", value=ratio, limit=limit, reason=reason, kind="cost"
        )
