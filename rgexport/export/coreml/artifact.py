"""An opened Core ML package: checks its program, and names altered weights."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import CoreMLManifest, io_record, stored_states
from rgexport.export.coreml.package import DECODE, PREFILL, PackagePlan, Segment, weight_file
from rgexport.export.coreml.storage import decode
from rgexport.export.manifest import StoredTensor, ValueRecord
from rgexport.export.mil.checks import check_package
from rgexport.export.mil.package import Package, open_package
from rgexport.export.mil.program import Function, TensorType
from rgexport.files.hashing import hash_file
from rgexport.quantize.scheme import Parts

_MAX_COMPLAINTS = 4

Types = dict[str, TensorType]


@dataclass(frozen=True)
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
            yield from self._wrong_form(package, plan)

    def _wrong_form(self, package: Package, plan: PackagePlan) -> Iterator[str]:
        expected = plan.functions
        if {*package.functions} != {*expected} or package.default_function != expected[0]:
            functions = ", ".join(sorted(package.functions))
            first, *rest = expected
            yield (
                f"{plan.name} has the functions {functions}, by default "
                f"{package.default_function}; expected {first} (the default) and {', '.join(rest)}"
            )
            return
        tokens = {DECODE: 1, PREFILL: self.manifest.coreml.prefill_length}
        for segment in plan.segments:
            for name, count in tokens.items():
                yield from self._wrong_function(
                    package.functions[segment.function(name)], segment, count
                )

    def _wrong_function(self, function: Function, segment: Segment, count: int) -> Iterator[str]:
        config, form, name = self.manifest.config, self.manifest.form, function.name
        io, shapes = io_record(config, form, segment), stored_states(config, form, segment)
        states = {state: TensorType("float16", shape) for state, shape in shapes.items()}
        yield from _differences(name, "input", function.inputs, _types(io.inputs, count))
        yield from _differences(name, "output", _outputs(function), _types(io.outputs, count))
        yield from _differences(name, "state", function.states, states)

    def _wrong_hashes(self, anew: bool) -> Iterator[str]:
        for complaint in super()._wrong_hashes(anew):
            yield complaint
            for plan in self.manifest.packages:
                if complaint.startswith(weight_file(plan.name)):
                    yield from self._altered_parts(plan)

    def _altered_parts(self, plan: PackagePlan) -> Iterator[str]:
        for name, stored in plan.tensors(self.manifest.tensors).items():
            for label, part in stored.parts.items():
                digest = hash_file(self.file(part.file), start=part.offset, length=part.nbytes)
                if digest.sha256 != self.manifest.coreml.blobs[f"{name}.{label}"]:
                    yield f"{name}.{label} was altered (its hash differs)"


def _types(values: tuple[ValueRecord, ...], tokens: int) -> Types:
    return {
        value.name: TensorType(
            value.dtype, tuple(tokens if size == "tokens" else int(size) for size in value.shape)
        )
        for value in values
    }


def _outputs(function: Function) -> Types:
    types = {name: type for operation in function.operations for name, type in operation.outputs}
    return {name: types[name] for name in function.outputs if name in types}


def _differences(function: str, kind: str, actual: Types, expected: Types) -> Iterator[str]:
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            yield (
                f"{function}: {kind} {name} is {actual.get(name) or 'missing'}; the manifest has "
                f"{expected.get(name) or 'none'}"
            )
