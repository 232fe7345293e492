"""A Core ML package that is opened: its program is looked at, and altered weights are named."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.form_checks import check_form
from rgexport.export.coreml.manifest import CoreMLManifest
from rgexport.export.coreml.package import MODEL_FILE, PACKAGE, WEIGHT_FILE
from rgexport.export.coreml.parts import decode
from rgexport.export.coreml.states import Form, io_record, state_records
from rgexport.export.manifest import MANIFEST
from rgexport.export.mil.own_metadata import check_metadata
from rgexport.export.mil.package import open_package
from rgexport.export.mil.structure import check_against, check_package
from rgexport.export.verified import is_marked_sound, mark_sound
from rgexport.files.hashing import hash_file
from rgexport.quantize.affine import Parts

_NAMED = 4
"""Of more things that are wrong, only the number is told."""


@dataclass(frozen=True)
class CoreMLArtifact(Artifact):
    """A folder with `model.mlpackage` and its manifest."""

    manifest: CoreMLManifest

    def facts(self) -> dict[str, Any]:
        """What the package looks like from outside; as plain JSON."""
        record = asdict(self.manifest.coreml)
        del record["blobs"]
        return {"coreml": record}

    def _decode(self, name: str, parts: Parts, columns: int) -> np.ndarray:
        return decode(name, parts, self.manifest.tensors[name])

    def complaints(self, verify: bool) -> list[str]:
        """The program is looked at before any hash, which could only say that it is another."""
        if missing := [name for name in self.manifest.files if not self.file(name).is_file()]:
            return [f"{name} is missing" for name in missing]
        path, content_hash = self.file(MODEL_FILE), self.manifest.content_hashes[MODEL_FILE]
        types = verify or not is_marked_sound(path, content_hash)
        wrong = [*self._wrong_structure(types), *self._wrong_sizes()]
        wrong = wrong or [*self._wrong_hashes(verify), *self._wrong_blobs(verify)]
        if types and not wrong:
            mark_sound(path, content_hash)
        return _first(wrong)

    def _wrong_structure(self, types: bool) -> Iterator[str]:
        """`types` is expensive, and spared where the program was found to be sound before."""
        package = open_package(self.path / PACKAGE)
        yield from check_package(package, types=types)
        yield from check_against(package, self.manifest.tensors)
        manifest, record = self.manifest, self.manifest.coreml
        shape = record.prefill_length, record.all_logits, record.recurrent_state
        form = Form(*shape, manifest.compute)
        records = state_records(manifest.config, form), io_record(manifest.config, form)
        if (manifest.states, manifest.io) != records:
            yield f"{MANIFEST} has other states, inputs or outputs than such a package"
        yield from check_form(package, manifest.config, form)
        yield from check_metadata(package, manifest.config, record.blobs)

    def _wrong_blobs(self, anew: bool) -> Iterator[str]:
        """Weights that were altered, also where the file's own hash was made to fit.

        They are looked at until they were found to be right: the file's hash may be known before.
        """
        path, content_hash = self.file(WEIGHT_FILE), self.manifest.content_hashes[WEIGHT_FILE]
        if not anew and is_marked_sound(path, content_hash):
            return
        wrong = [f"{blob} was altered (its hash differs)" for blob in self._altered_blobs()]
        yield from wrong
        if not wrong:
            mark_sound(path, content_hash)

    def _altered_blobs(self) -> Iterator[str]:
        """`TENSOR.PART` of each blob that has another hash."""
        for name, stored in self.manifest.tensors.items():
            for label, part in stored.parts.items():
                digest = hash_file(self.file(part.file), start=part.offset, length=part.nbytes)
                if digest.sha256 != self.manifest.coreml.blobs[f"{name}.{label}"]:
                    yield f"{name}.{label}"


def _first(complaints: list[str]) -> list[str]:
    rest = len(complaints) - _NAMED
    return complaints[:_NAMED] + ([f"and {rest} more"] if rest > 0 else [])
