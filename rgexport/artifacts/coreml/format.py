"""The format of Core ML artifacts, which checks programs and weights, and of others' packages."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact, differences
from rgexport.artifacts.coreml import package as packages
from rgexport.artifacts.coreml.manifest import (
    CoreMLManifest,
    io_record,
    state_records,
    stored_states,
)
from rgexport.artifacts.coreml.mil.checks import check_package
from rgexport.artifacts.coreml.mil.description import describe_package, package_text
from rgexport.artifacts.coreml.mil.package import Package, means_package, open_package
from rgexport.artifacts.coreml.mil.program import TensorType
from rgexport.artifacts.coreml.storage import decode, part_shapes
from rgexport.artifacts.format import CardText, FolderFormat, render
from rgexport.artifacts.manifest import IoRecord, Manifest, StateRecord, StoredTensor, ValueRecord
from rgexport.files.hashing import hash_file
from rgexport.files.typed_json import Mismatch, shown_key
from rgexport.quantize.plan import COREML_PRECISIONS, MIXED
from rgexport.quantize.schemes.registry import Parts, PartShapes, Scheme, Uniform
from rgexport.reporting.tables import Table

_MAX_COMPLAINTS = 4
Types = dict[str, TensorType]


@dataclass(frozen=True, repr=False)
class CoreMLArtifact(Artifact):
    manifest: CoreMLManifest

    def facts(self) -> dict[str, Any]:
        record = asdict(self.manifest.coreml)
        del record["blobs"]
        return {"coreml": record}

    def _decode(self, name: str, stored: StoredTensor, arrays: Parts, columns: int) -> np.ndarray:
        return decode(name, arrays, stored)

    def complaints(self, verify: bool) -> list[str]:
        """Lists damage; the program comes first, since a hash says less about it."""
        if missing := [name for name in self._sealed if not self.file(name).is_file()]:
            return [f"{name} is missing" for name in missing]
        wrong = [*self._wrong_packages(), *self._wrong_sizes()] or [*self._wrong_hashes(verify)]
        rest = len(wrong) - _MAX_COMPLAINTS
        return wrong[:_MAX_COMPLAINTS] + ([f"and {rest} more"] if rest > 0 else [])

    def _wrong_packages(self) -> Iterator[str]:
        for plan in self.manifest.packages:
            package = open_package(self.path / plan.name)
            yield from check_package(package, plan.uses(self.manifest.tensors))
            first, *rest = plan.functions
            if {*package.functions} == {first, *rest} and package.default_function == first:
                yield from self._wrong_functions(package, plan)
            else:
                yield (
                    f"{plan.name} has {', '.join(sorted(package.functions))}, by default "
                    f"{package.default_function}; expected {first} (default), {', '.join(rest)}"
                )

    def _wrong_functions(self, package: Package, plan: packages.PackagePlan) -> Iterator[str]:
        config, form = self.manifest.config, self.manifest.form
        for segment in plan.segments:
            io, shapes = io_record(config, form, segment), stored_states(config, form, segment)
            states = {state: TensorType("float16", shape) for state, shape in shapes.items()}
            for kind, count in ((packages.DECODE, 1), (packages.PREFILL, form.prefill_length)):
                function = package.functions[segment.function(kind)]
                types = {name: type for op in function.operations for name, type in op.outputs}
                outputs = {name: types[name] for name in function.outputs if name in types}
                inputs, name = function.inputs, function.name
                yield from differences(f"{name}: input", inputs, _types(io.inputs, count))
                yield from differences(f"{name}: output", outputs, _types(io.outputs, count))
                yield from differences(f"{name}: state", function.states, states)

    def _wrong_hashes(self, anew: bool) -> Iterator[str]:
        for complaint in super()._wrong_hashes(anew):
            yield complaint
            for name, stored in self.manifest.tensors.items():
                for label, part in stored.parts.items():
                    if not complaint.startswith(part.file):
                        continue
                    digest = hash_file(self.file(part.file), start=part.offset, length=part.nbytes)
                    if digest.sha256 != self.manifest.coreml.blobs[f"{name}.{label}"]:
                        yield f"{name}.{label} was altered (its hash differs)"


def _types(values: tuple[ValueRecord, ...], tokens: int) -> Types:
    types = {}
    for value in values:
        shape = tuple(tokens if size == "tokens" else int(size) for size in value.shape)
        types[value.name] = TensorType(value.dtype, shape)
    return types


class CoreMLFormat(FolderFormat):
    manifest = CoreMLManifest
    artifact = CoreMLArtifact
    precisions = COREML_PRECISIONS
    planned_precisions = (MIXED,)
    entries = (packages.PACKAGE, packages.ENDS)
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
        return state_records(config, form), io_record(
            config, form, packages.whole(config.num_layers)
        )

    def check_manifest(self, manifest: Manifest) -> None:
        assert isinstance(manifest, CoreMLManifest)
        length, hashes = manifest.coreml.prefill_length, manifest.coreml.blobs
        layers, split = manifest.config.num_layers, manifest.coreml.split
        if split and (sum(split) != layers or min(split) < 1):
            raise Mismatch(f"coreml.split is {list(split)}; expected numbers that sum to {layers}")
        for plan in manifest.packages:
            if (file := packages.model_file(plan.name)) not in manifest.files:
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
        stages = packages.in_order(manifest.packages)
        steps = [
            f"`{segment.function(packages.DECODE)}` of `{plan.name}`" for plan, segment in stages
        ]
        run = render("coreml.md.j2", manifest=manifest, verb=verb, steps=steps)
        return CardText("Core ML", "soft cap", run)

    def describe_foreign(self, path: Path) -> dict[str, Any] | None:
        return describe_package(path) if means_package(path) else None

    def foreign_text(self, description: dict[str, Any]) -> Iterator[str | Table]:
        return package_text(description)


FORMAT = CoreMLFormat()
