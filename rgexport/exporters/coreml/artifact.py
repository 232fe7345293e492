"""An opened Core ML package: checks its program, and names altered weights."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rgexport.exporters.artifact import Artifact, differences
from rgexport.exporters.coreml.manifest import CoreMLManifest, io_record, stored_states
from rgexport.exporters.coreml.package import DECODE, PREFILL, PackagePlan
from rgexport.exporters.coreml.storage import decode
from rgexport.exporters.manifest import StoredTensor, ValueRecord
from rgexport.exporters.mil.checks import check_package
from rgexport.exporters.mil.package import Package, open_package
from rgexport.exporters.mil.program import TensorType
from rgexport.files.hashing import hash_file
from rgexport.quantization.scheme import Parts

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
                    f"{plan.name} has the functions {', '.join(sorted(package.functions))}, by "
                    f"default {package.default_function}; expected {first} (the default) and "
                    f"{', '.join(rest)}"
                )

    def _wrong_functions(self, package: Package, plan: PackagePlan) -> Iterator[str]:
        config, form = self.manifest.config, self.manifest.form
        for segment in plan.segments:
            io, shapes = io_record(config, form, segment), stored_states(config, form, segment)
            states = {state: TensorType("float16", shape) for state, shape in shapes.items()}
            for kind, count in ((DECODE, 1), (PREFILL, form.prefill_length)):
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
