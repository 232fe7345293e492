"""Opens an artifact and everything that it is validated against, before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.artifacts.opening import open_artifact
from rgexport.chat.artifact_text import open_tokenizer
from rgexport.chat.tokenizer import Tokenizer
from rgexport.choices import GradeName
from rgexport.errors import RequestError
from rgexport.files.hashing import hash_new_files
from rgexport.griffin.layout import float32_bytes
from rgexport.progress import detail, warn
from rgexport.quantize.algorithms.calibrated import Calibrated
from rgexport.quantize.algorithms.calibration_file import open_calibration
from rgexport.quantize.algorithms.statistics import StatisticsOf, no_statistics
from rgexport.runtimes.engine import engine_of
from rgexport.validate.continuations import SMALL_BYTES
from rgexport.validate.identity import IdentityItem
from rgexport.validate.reference.against import check_fits
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.source import OriginalModel, compare_identity, find_original
from rgexport.validate.text import Text, choose_text


@dataclass(frozen=True, kw_only=True)
class ValidationRequest:
    """The options of `rgexport validate` for one artifact, as `api.validate` explains them."""

    model: str | None = None
    adapter: Path | None = None
    text: Path | None = None
    max_tokens: int | None = None
    reference: ReferenceFile | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    bisect: bool = False
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
        """The artifact's manifest."""
        return self.artifact.manifest

    @property
    def has_native(self) -> bool:
        """Whether native kernels replace the functions that other runtimes run."""
        return engine_of(self.manifest.kind).has_native(self.artifact)

    @property
    def asks_original(self) -> bool:
        """Whether a small original continues prompts, as no reference file has any."""
        if self.tokenizer is None or self.original is None or self.request.reference is not None:
            return False
        return float32_bytes(self.original.checkpoint.config) <= SMALL_BYTES


def open_all(path: Path, request: ValidationRequest) -> OpenedArtifact:
    """Opens an artifact and everything that it is compared with, before anything runs.

    Raises:
        RequestError: It is no sound artifact, an original or a reference does not fit, a text
            cannot be read, or a quality is asked for without anything to grade it by.
    """
    if request.calibration is not None and not request.reproduce:
        raise RequestError("--calibration is for --reproduce; give both, or leave it out")
    artifact = open_artifact(path, allow_foreign=request.allow_foreign)
    manifest = artifact.manifest
    config = manifest.config
    engine_of(manifest.kind).require_trusted(artifact)
    if request.reference is not None:
        check_fits(request.reference, manifest)

    tokenizer = None
    if manifest.has_tokenizer:
        tokenizer = open_tokenizer(artifact)
    text = choose_text(
        tokenizer, config.vocab_size, config.window, request.text, request.max_tokens
    )
    detail(f"Validating {artifact.path} on {len(text.tokens)} tokens ({text.name})")

    original = find_original(manifest, request.model, request.adapter)
    statistics = None
    if original is None:
        _check_without_original(request, manifest)
    else:
        if request.reproduce:
            statistics = _open_statistics(request, manifest, original)
        _warn_of_differences(original)
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


def _check_without_original(request: ValidationRequest, manifest: Manifest) -> None:
    """Refuses options that need the original; warns if nothing can take its place."""
    missing = f"the original ({manifest.source.name}) was not given"
    if request.reproduce:
        raise RequestError(f"--reproduce: {missing}; pass it with -m")
    if request.reference is not None:
        return
    if request.min_quality is not None:
        option = f"--min-quality {request.min_quality}"
        raise RequestError(f"{option}: {missing}; pass it with -m, or --reference")
    warn(f"{missing}, so the cost of compression is not measured; pass it with -m")


def _warn_of_differences(original: OriginalModel) -> None:
    if not original.same_files:
        folder = original.checkpoint.path
        warn(f"{folder} has other weight files than the artifact was made from")
    for difference in original.config_differences:
        warn(f"the configurations differ in {difference}")


def _open_statistics(
    request: ValidationRequest, manifest: Manifest, original: OriginalModel
) -> StatisticsOf:
    """Opens the statistics that the export's encoders took; RequestError if they are missing."""
    if request.calibration is not None:
        calibration = open_calibration(request.calibration)
        checkpoint = original.checkpoint
        hashes = hash_new_files(checkpoint.weight_files.values())
        calibration.require_for(hashes.values())
        return Calibrated(calibration, checkpoint.config)
    needs_statistics = any(scheme.needs_statistics for scheme in manifest.plan.values())
    if manifest.weighted or needs_statistics:
        raise RequestError(
            "--reproduce: these levels were chosen by data; give the calibration that the export "
            "took with --calibration (an importance matrix cannot be given)"
        )
    return no_statistics
