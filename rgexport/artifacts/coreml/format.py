"""The format of Core ML artifacts: checks of their programs and weights; others' packages."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.artifact import Artifact, differences
from rgexport.artifacts.coreml.manifest import (
    CoreMLManifest,
    io_record,
    state_records,
    stored_states,
)
from rgexport.artifacts.coreml.mil.checks import check_package
from rgexport.artifacts.coreml.mil.description import describe_package, package_text
from rgexport.artifacts.coreml.mil.package import Package, means_package, open_package
from rgexport.artifacts.coreml.mil.program import Function, TensorType
from rgexport.artifacts.coreml.package import (
    DECODE,
    ENDS,
    PACKAGE,
    PREFILL,
    PackagePlan,
    Segment,
    in_order,
    model_file,
    whole,
)
from rgexport.artifacts.coreml.storage import decode, part_shapes
from rgexport.artifacts.format import CardText, FolderFormat, render
from rgexport.artifacts.manifest import (
    IoRecord,
    Manifest,
    StateRecord,
    StoredPart,
    StoredTensor,
    ValueRecord,
)
from rgexport.files.hashing import hash_file
from rgexport.files.typed_json import Mismatch, shown_key
from rgexport.quantize.plan import COREML_PRECISIONS, MIXED
from rgexport.quantize.schemes.registry import Parts, PartShapes, Scheme, Uniform
from rgexport.reporting.tables import Table

_MAX_COMPLAINTS = 4
_SHA256_DIGITS = 64  # hexadecimal digits of a hash
_Types = dict[str, TensorType]


@dataclass(frozen=True, repr=False)
class CoreMLArtifact(Artifact):
    """An opened Core ML artifact."""

    manifest: CoreMLManifest

    def facts(self) -> dict[str, Any]:
        """Returns the manifest's record of Core ML without the hashes of blobs, as plain JSON."""
        record = asdict(self.manifest.coreml)
        del record["blobs"]
        return {"coreml": record}

    def _decode(self, name: str, stored: StoredTensor, arrays: Parts, columns: int) -> np.ndarray:
        return decode(name, arrays, stored)

    def complaints(self, verify: bool) -> list[str]:
        """Lists damage; the program comes first, since a hash says less about it."""
        missing = [name for name in self._sealed if not self.file(name).is_file()]
        if missing:
            return [f"{name} is missing" for name in missing]

        complaints = [*self._wrong_packages(), *self._wrong_sizes()]
        if not complaints:
            complaints = list(self._wrong_hashes(verify))

        hidden = len(complaints) - _MAX_COMPLAINTS
        if hidden > 0:
            return [*complaints[:_MAX_COMPLAINTS], f"and {hidden} more"]
        return complaints

    def _wrong_packages(self) -> Iterator[str]:
        for plan in self.manifest.packages:
            package = open_package(self.path / plan.name)
            uses = plan.uses(self.manifest.tensors)
            yield from check_package(package, uses)

            first, *others = plan.functions
            has_functions = package.functions.keys() == {first, *others}
            if has_functions and package.default_function == first:
                yield from self._wrong_segments(package, plan)
            else:
                names = ", ".join(sorted(package.functions))
                yield (
                    f"{plan.name} has {names}, by default {package.default_function}; "
                    f"expected {first} (default), {', '.join(others)}"
                )

    def _wrong_segments(self, package: Package, plan: PackagePlan) -> Iterator[str]:
        prefill_length = self.manifest.form.prefill_length
        for segment in plan.segments:
            decode_function = package.functions[segment.function(DECODE)]
            yield from self._wrong_features(decode_function, segment, 1)
            prefill_function = package.functions[segment.function(PREFILL)]
            yield from self._wrong_features(prefill_function, segment, prefill_length)

    def _wrong_features(
        self, function: Function, segment: Segment, num_tokens: int
    ) -> Iterator[str]:
        """Yields how the inputs, outputs and states of a function differ from the interface."""
        config = self.manifest.config
        form = self.manifest.form
        io = io_record(config, form, segment)
        inputs = _value_types(io.inputs, num_tokens)
        outputs = _value_types(io.outputs, num_tokens)
        states = _state_types(stored_states(config, form, segment))

        name = function.name
        yield from differences(f"{name}: input", function.inputs, inputs)
        yield from differences(f"{name}: output", _output_types(function), outputs)
        yield from differences(f"{name}: state", function.states, states)

    def _wrong_hashes(self, anew: bool) -> Iterator[str]:
        """Yields the files with another hash, and after each weight file its altered parts."""
        for complaint in super()._wrong_hashes(anew):
            yield complaint
            for name, part in self._parts():
                if complaint.startswith(part.file) and self._is_altered(name, part):
                    yield f"{name} was altered (its hash differs)"

    def _parts(self) -> Iterator[tuple[str, StoredPart]]:
        """Yields all parts of tensors, named `TENSOR.PART`."""
        for tensor, stored in self.manifest.tensors.items():
            for label, part in stored.parts.items():
                yield f"{tensor}.{label}", part

    def _is_altered(self, name: str, part: StoredPart) -> bool:
        path = self.file(part.file)
        record = hash_file(path, start=part.offset, length=part.nbytes)
        return record.sha256 != self.manifest.coreml.blobs[name]


def _output_types(function: Function) -> _Types:
    """Returns the types of a function's outputs that an operation computes."""
    computed: _Types = {}
    for operation in function.operations:
        computed.update(operation.outputs)
    return {name: computed[name] for name in function.outputs if name in computed}


def _value_types(values: tuple[ValueRecord, ...], num_tokens: int) -> _Types:
    types = {}
    for value in values:
        shape = []
        for size in value.shape:
            if size == "tokens":
                shape.append(num_tokens)
            else:
                shape.append(int(size))
        types[value.name] = TensorType(value.dtype, tuple(shape))
    return types


def _state_types(shapes: Mapping[str, tuple[int, ...]]) -> _Types:
    types = {}
    for name, shape in shapes.items():
        types[name] = TensorType("float16", shape)
    return types


class CoreMLFormat(FolderFormat):
    """The format `coreml`: a folder with one or several packages."""

    manifest = CoreMLManifest
    artifact = CoreMLArtifact
    precisions = COREML_PRECISIONS
    planned_precisions = (MIXED,)
    entries = (PACKAGE, ENDS)
    foreign_kind = "mlpackage"
    alignment = 64
    part_header = 64
    graph_bytes = 124_000
    runs_on = "on iOS 18 and macOS 15: what ends in .mlpackage goes into an Xcode project"

    def part_shapes(self, shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
        """Returns the parts of a tensor; raises RequestError if Core ML lacks the scheme."""
        return part_shapes(shape, scheme)

    def candidate(self, scheme: Uniform, shape: tuple[int, ...]) -> Uniform | None:
        """Returns the closest scheme without padding."""
        return super().candidate(scheme.fitted(shape), shape)

    def interface(self, manifest: Manifest) -> tuple[tuple[StateRecord, ...], IoRecord]:
        """Returns the states, inputs and outputs of the whole model, however it is cut."""
        assert isinstance(manifest, CoreMLManifest)
        config = manifest.config
        form = manifest.form
        states = state_records(config, form)
        io = io_record(config, form, whole(config.num_layers))
        return states, io

    def check_manifest(self, manifest: Manifest) -> None:
        """Raises Mismatch if the packages, the prefill length or the hashes of blobs are wrong."""
        assert isinstance(manifest, CoreMLManifest)
        _check_packages(manifest)

        length = manifest.coreml.prefill_length
        if length < 2:
            raise Mismatch(f"coreml.prefill_length is {length}; expected at least 2")

        _check_blob_hashes(manifest)

    def card(self, manifest: Manifest, verb: str) -> CardText:
        """Returns the card's texts, with the functions that a token passes in their order."""
        assert isinstance(manifest, CoreMLManifest)
        steps = []
        for plan, segment in in_order(manifest.packages):
            function = segment.function(DECODE)
            steps.append(f"`{function}` of `{plan.name}`")
        run = render("coreml.md.j2", manifest=manifest, verb=verb, steps=steps)
        return CardText("Core ML", "soft cap", run)

    def describe_foreign(self, path: Path) -> dict[str, Any] | None:
        """Describes a package that is not in an artifact; None for any other path."""
        if not means_package(path):
            return None
        return describe_package(path)

    def foreign_text(self, description: dict[str, Any]) -> Iterator[str | Table]:
        """Yields the lines and tables that present a description of a package."""
        return package_text(description)


def _check_packages(manifest: CoreMLManifest) -> None:
    num_layers = manifest.config.num_layers
    split = manifest.coreml.split
    if split and (sum(split) != num_layers or min(split) < 1):
        raise Mismatch(f"coreml.split is {list(split)}; expected numbers that sum to {num_layers}")

    for plan in manifest.packages:
        file = model_file(plan.name)
        if file not in manifest.files:
            raise Mismatch(f"files: there is no {file}")


def _check_blob_hashes(manifest: CoreMLManifest) -> None:
    names: set[str] = set()
    for tensor, stored in manifest.tensors.items():
        names.update(f"{tensor}.{label}" for label in stored.parts)

    hashes = manifest.coreml.blobs
    for blob in names ^ hashes.keys():
        raise Mismatch(f"coreml.blobs: {shown_key(blob)} is not a part of a tensor, or has no hash")
    for blob, digest in hashes.items():
        if len(digest) != _SHA256_DIGITS:
            raise Mismatch(f"coreml.blobs.{blob}: not a hash")


FORMAT = CoreMLFormat()
