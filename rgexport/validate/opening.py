"""Opens an artifact and everything that it is compared with, before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer
from rgexport.choices import GradeName
from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import Manifest
from rgexport.export.opening import open_artifact
from rgexport.files.hashing import hash_new_files
from rgexport.progress import detail, warn
from rgexport.quantize.calibration import open_calibration
from rgexport.quantize.statistics import Calibrated, StatisticsOf, no_statistics
from rgexport.runtimes.engine import engine_of
from rgexport.validate.identity.compare import compare_identity
from rgexport.validate.identity.items import IdentityItem
from rgexport.validate.reference.against import check_fits
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.source import OriginalModel, find_original
from rgexport.validate.text import Text, choose_text


@dataclass(frozen=True, kw_only=True)
class ValidationRequest:
    """The options of `rgexport validate` for one artifact.

    `model` is a folder or hub id; `bisect` measures each layer's cost and names suspects;
    `reproduce` encodes the original's weights again, with the `calibration` of the export;
    `allow_foreign` lets a graph run that has ops which rgexport does not write.
    """

    model: str | None = None
    adapter: Path | None = None
    text: Path | None = None
    max_tokens: int | None = None
    reference: ReferenceFile | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    bisect: bool = False
    bench: bool = False
    reproduce: bool = False
    calibration: Path | None = None
    min_quality: GradeName | None = None
    allow_foreign: bool = False


@dataclass(frozen=True, kw_only=True)
class OpenedArtifact:
    """An artifact and all that it is compared with; `statistics` are for `reproduce`."""

    path: Path
    request: ValidationRequest
    artifact: Artifact
    tokenizer: Tokenizer | None
    text: Text
    original: OriginalModel | None
    statistics: StatisticsOf | None
    identity: tuple[IdentityItem, ...]

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest


def open_all(path: Path, request: ValidationRequest) -> OpenedArtifact:
    """Opens an artifact and everything that it is compared with.

    Raises:
        RequestError: no sound artifact, an original or a reference that does not fit, an unreadable
            text, or a quality that is asked for without anything to grade it by.
    """
    if request.calibration is not None and not request.reproduce:
        raise RequestError("--calibration is for --reproduce; give both, or leave it out")
    artifact = open_artifact(path, allow_foreign=request.allow_foreign)
    engine_of(artifact.manifest.kind).require_trusted(artifact)
    manifest = artifact.manifest
    if request.reference is not None:
        check_fits(request.reference, manifest)
    tokenizer = open_tokenizer(artifact) if manifest.has_tokenizer else None
    text = choose_text(
        tokenizer,
        vocab_size=manifest.config.vocab_size,
        window=manifest.config.window,
        file=request.text,
        limit=request.max_tokens,
    )
    detail(f"Validating {artifact.path} on {len(text.tokens)} tokens ({text.name})")
    original = find_original(manifest, request.model, request.adapter)
    statistics = _statistics(request, manifest, original) if request.reproduce else None
    if original is not None:
        if not original.same_files:
            folder = original.checkpoint.path
            warn(f"{folder} has other weight files than the artifact was made from")
        for difference in original.config_differences:
            warn(f"the configurations differ in {difference}")
    elif request.reference is None:
        _go_without_original(request, manifest.source.name)
    return OpenedArtifact(
        path=path,
        request=request,
        artifact=artifact,
        tokenizer=tokenizer,
        text=text,
        original=original,
        statistics=statistics,
        identity=compare_identity(artifact, tokenizer, original, request.reference),
    )


def _go_without_original(request: ValidationRequest, source: str) -> None:
    if request.min_quality is not None:
        raise RequestError(
            f"--min-quality {request.min_quality}: the original ({source}) was not given, so there "
            "is no quality to judge; pass it with -m, or a file with --reference"
        )
    warn(
        f"the original ({source}) was not given, so the cost of compression is not measured; pass "
        "it with -m"
    )


def _statistics(
    request: ValidationRequest, manifest: Manifest, original: OriginalModel | None
) -> StatisticsOf:
    if original is None:
        raise RequestError(
            f"--reproduce encodes the original's weights again, but the original "
            f"({manifest.source.name}) was not given; pass it with -m"
        )
    if request.calibration is not None:
        calibration, checkpoint = open_calibration(request.calibration), original.checkpoint
        calibration.require_for(hash_new_files(checkpoint.weight_files.values()).values())
        return Calibrated(calibration, checkpoint.config)
    if manifest.weighted or any(scheme.needs_statistics for scheme in manifest.plan.values()):
        raise RequestError(
            "--reproduce: these levels were chosen by data; give the calibration that the export "
            "took with --calibration (an importance matrix cannot be given)"
        )
    return no_statistics
