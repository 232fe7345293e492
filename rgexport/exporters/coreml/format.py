"""The format of Core ML artifacts, and of Core ML packages of other tools."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rgexport.exporters.coreml.artifact import CoreMLArtifact
from rgexport.exporters.coreml.manifest import CoreMLManifest, io_record, state_records
from rgexport.exporters.coreml.package import DECODE, ENDS, PACKAGE, in_order, model_file, whole
from rgexport.exporters.coreml.storage import part_shapes
from rgexport.exporters.format import CardText, FolderFormat, render
from rgexport.exporters.manifest import IoRecord, Manifest, StateRecord
from rgexport.exporters.mil.checks import describe_package, package_text
from rgexport.exporters.mil.package import means_package
from rgexport.files.typed_json import Mismatch, shown_key
from rgexport.quantization.plan import COREML_PRECISIONS
from rgexport.quantization.scheme import PartShapes, Scheme, Uniform
from rgexport.reporting.tables import Table


class CoreMLFormat(FolderFormat):
    manifest = CoreMLManifest
    artifact = CoreMLArtifact
    precisions = COREML_PRECISIONS
    entries = (PACKAGE, ENDS)
    foreign_kind = "mlpackage"
    alignment = part_header = 64
    graph_bytes = 124_000
    runs_on = "on iOS 18 and macOS 15: what ends in .mlpackage goes into an Xcode project"

    def part_shapes(self, shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
        return part_shapes(shape, scheme)

    def candidate(self, scheme: Uniform, shape: tuple[int, ...]) -> Uniform | None:
        """Returns the closest scheme without padding."""
        return super().candidate(scheme.fitted(shape), shape)

    def interface(self, manifest: Manifest) -> tuple[tuple[StateRecord, ...], IoRecord]:
        assert isinstance(manifest, CoreMLManifest)
        config, form = manifest.config, manifest.form
        return state_records(config, form), io_record(config, form, whole(config.num_layers))

    def check_manifest(self, manifest: Manifest) -> None:
        assert isinstance(manifest, CoreMLManifest)
        length, hashes = manifest.coreml.prefill_length, manifest.coreml.blobs
        layers, split = manifest.config.num_layers, manifest.coreml.split
        if split and (sum(split) != layers or min(split) < 1):
            raise Mismatch(f"coreml.split is {list(split)}; expected numbers that sum to {layers}")
        for plan in manifest.packages:
            if (file := model_file(plan.name)) not in manifest.files:
                raise Mismatch(f"files: there is no {file}")
        if length < 2:
            raise Mismatch(f"coreml.prefill_length is {length}; expected at least 2")
        names = {f"{name}.{part}" for name, t in manifest.tensors.items() for part in t.parts}
        for blob in names ^ hashes.keys():
            raise Mismatch(
                f"coreml.blobs: {shown_key(blob)} is not a part of a tensor, or has no hash"
            )
        for blob, digest in hashes.items():
            if len(digest) != 64:
                raise Mismatch(f"coreml.blobs.{blob}: not a hash")

    def card(self, manifest: Manifest, verb: str) -> CardText:
        assert isinstance(manifest, CoreMLManifest)
        stages = in_order(manifest.packages)
        steps = [f"`{segment.function(DECODE)}` of `{plan.name}`" for plan, segment in stages]
        run = render("coreml.md.j2", manifest=manifest, verb=verb, steps=steps)
        return CardText("Core ML", "soft cap", run)

    def describe_foreign(self, path: Path) -> dict[str, Any] | None:
        return describe_package(path) if means_package(path) else None

    def foreign_text(self, description: dict[str, Any]) -> Iterator[str | Table]:
        return package_text(description)


FORMAT = CoreMLFormat()
