"""The format of Core ML artifacts, and of Core ML packages of other tools."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rgexport.export.artifact import Artifact
from rgexport.export.coreml.manifest import CoreMLManifest, io_record, state_records
from rgexport.export.coreml.package import DECODE, ENDS, PACKAGE, in_order, model_file, whole
from rgexport.export.coreml.storage import part_shapes
from rgexport.export.format import CardText, FolderFormat, installation
from rgexport.export.manifest import IoRecord, Manifest, StateRecord
from rgexport.files.typed_json import Mismatch, shown_key
from rgexport.quantize.plan import COREML_PRECISIONS
from rgexport.quantize.scheme import PartShapes, Scheme, Uniform
from rgexport.reporting.tables import Table

_RUN = """\
`model.mlpackage` goes into an Xcode project, for iOS 18, macOS 15 and later. It has two functions
that share weights and states: `decode`, the default, takes one token and `prefill` takes
{prefill_length}; what remains of a prompt goes through `decode`.

Inputs: {inputs}.
Outputs: {outputs}.
The rest of a conversation is an `MLState`; Xcode shows what each feature is.

"""
_RUN_SPLIT = """\
The packages go into an Xcode project, for iOS 18, macOS 15 and later. They are parts of one model.
A step runs {steps}; each gives the `hidden_state_out` that is the `hidden_state` of the next. For
{prefill_length} tokens at a time there is a `prefill` beside each `decode`. Each package of layers
has an `MLState`, and its own rows of `recurrent_state`.

Inputs of the model as a whole: {inputs}.
Outputs: {outputs}.

"""
_RUN_ON_A_MAC = """\
The Swift package swift-transformers reads `tokenizer.json`. `docs/coreml.md` in rgexport's
repository has Swift code for a conversation.

{install}, in this folder,

    rgexport {verb}

runs it on a Mac; elsewhere an interpreter computes the same, slowly."""


class CoreMLFormat(FolderFormat):
    manifest = CoreMLManifest
    library = "coreml"
    precisions = COREML_PRECISIONS
    entries = (PACKAGE, ENDS)
    foreign_kind = "mlpackage"
    alignment = part_header = 64
    graph_bytes = 124_000
    runs_on = "on iOS 18 and macOS 15: what ends in .mlpackage goes into an Xcode project"

    def artifact(self, folder: Path, manifest: Manifest) -> Artifact:
        from rgexport.export.coreml.artifact import CoreMLArtifact  # reads programs, too

        assert isinstance(manifest, CoreMLManifest)
        return CoreMLArtifact(folder, manifest)

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
        stages = list(in_order(manifest.packages))
        steps = [f"`{s.function(DECODE)}` of `{plan.name}`" for plan, s in stages]
        facts = {"verb": verb, "install": installation("coreml"), "steps": ", ".join(steps)}
        for group, values in vars(manifest.io).items():
            facts[group] = ", ".join(f"`{value.name}`" for value in values)
        text = (_RUN_SPLIT if len(stages) > 1 else _RUN) + _RUN_ON_A_MAC
        run = text.format(prefill_length=manifest.coreml.prefill_length, **facts)
        return CardText("Core ML", "soft cap", run)

    def describe_foreign(self, path: Path, *, verify: bool) -> dict[str, Any] | None:
        from rgexport.export.mil.checks import describe_package  # reads programs, too
        from rgexport.export.mil.package import means_package

        return describe_package(path) if means_package(path) else None

    def foreign_text(self, description: dict[str, Any]) -> Iterator[str | Table]:
        from rgexport.export.mil.checks import package_text

        return package_text(description)


FORMAT = CoreMLFormat()
