"""A Core ML package that is opened: its program is checked, and altered weights are named."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import CoreMLManifest
from rgexport.export.coreml.package import PACKAGE, WEIGHT_FILE
from rgexport.export.coreml.parts import decode
from rgexport.export.coreml.states import (
    DECODE,
    PREFILL,
    Form,
    io_record,
    state_records,
    stored_states,
)
from rgexport.export.manifest import MANIFEST, StoredTensor, ValueRecord
from rgexport.export.mil.checks import check_package
from rgexport.export.mil.package import Package, open_package
from rgexport.export.mil.program import Function, TensorType
from rgexport.files.hashing import hash_file
from rgexport.quantize.affine import Parts

_NAMED = 4
"""Complaints that are shown; of the rest, only the number."""

Types = dict[str, TensorType]


@dataclass(frozen=True)
class CoreMLArtifact(Artifact):
    """A folder with `model.mlpackage` and its manifest."""

    manifest: CoreMLManifest

    def facts(self) -> dict[str, Any]:
        """What the package looks like from outside; as plain JSON."""
        record = asdict(self.manifest.coreml)
        del record["blobs"]
        return {"coreml": record}

    def _decode(self, name: str, stored: StoredTensor, parts: Parts, columns: int) -> np.ndarray:
        return decode(name, parts, stored)

    def complaints(self, verify: bool) -> list[str]:
        """What is wrong with the package; the program first, since a hash says less about it."""
        if missing := [name for name in self._sealed if not self.file(name).is_file()]:
            return [f"{name} is missing" for name in missing]
        package = open_package(self.path / PACKAGE)
        wrong = [
            *check_package(package, self.manifest.tensors),
            *self._wrong_form(package),
            *self._wrong_sizes(),
        ]
        return _first(wrong or list(self._wrong_hashes(verify)))

    def _wrong_form(self, package: Package) -> Iterator[str]:
        """Functions, inputs, outputs and states that a session could not use."""
        manifest, record = self.manifest, self.manifest.coreml
        shape = record.prefill_length, record.all_logits, record.recurrent_state
        form = Form(*shape, manifest.compute)
        io = io_record(manifest.config, form)
        if (manifest.states, manifest.io) != (state_records(manifest.config, form), io):
            yield f"{MANIFEST} has other states, inputs or outputs than such a package"
        tokens = {DECODE: 1, PREFILL: record.prefill_length}
        if package.functions.keys() != tokens.keys() or package.default_function != DECODE:
            found = ", ".join(sorted(package.functions))
            yield (
                f"{PACKAGE} has the functions {found}, by default {package.default_function}; "
                f"expected {DECODE} (the default) and {PREFILL}"
            )
            return
        shapes = stored_states(manifest.config, form).items()
        states = {name: TensorType("float16", shape) for name, shape in shapes}
        for name, count in tokens.items():
            function = package.functions[name]
            yield from _differences(name, "input", function.inputs, _types(io.inputs, count))
            yield from _differences(name, "output", _outputs(function), _types(io.outputs, count))
            yield from _differences(name, "state", function.states, states)

    def _wrong_hashes(self, anew: bool) -> Iterator[str]:
        """Of the file of weights, the parts that were altered are named too."""
        for complaint in super()._wrong_hashes(anew):
            yield complaint
            if complaint.startswith(WEIGHT_FILE):
                yield from self._altered_parts()

    def _altered_parts(self) -> Iterator[str]:
        for name, stored in self.manifest.tensors.items():
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


def _differences(function: str, kind: str, found: Types, expected: Types) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        here, there = found.get(name), expected.get(name)
        if here != there:
            yield (
                f"{function}: {kind} {name} is {here or 'missing'}; the manifest has "
                f"{there or 'none'}"
            )


def _first(complaints: list[str]) -> list[str]:
    rest = len(complaints) - _NAMED
    return complaints[:_NAMED] + ([f"and {rest} more"] if rest > 0 else [])
