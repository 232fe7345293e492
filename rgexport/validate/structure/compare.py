"""Compares an artifact's structure with the one that the exporter writes, and records fingerprints.

A reference file has the fingerprints, for machines that cannot make the structures again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from rgexport._version import __version__
from rgexport.artifacts.artifact import Artifact
from rgexport.errors import RequestError, one_line
from rgexport.formats import FORMATS
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.progress import detail, note, task
from rgexport.validate.formats.expected import Expected, Recipe, expected_of, version_text
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.structure.elements import Fingerprint, fingerprint, first_difference

MOST_LAYERS = 256
"""Layers of a model that is lowered again: seven times those of a 9B."""


@dataclass(frozen=True)
class StructureReport:
    """Whether an artifact's graph is the one that the exporter writes for its config and plan.

    `differs` is a fault; with `other version`, the artifact names another writer than this version.
    `reason` tells the writer, the first difference, or why nothing was compared.
    """

    status: Literal["as written", "differs", "other version", "not checked"]
    reason: str

    @property
    def in_verdict(self) -> bool:
        return self.status in ("as written", "differs")


NOT_COMPARED = StructureReport("not checked", "nobody asked for it")


def compare_structure(artifact: Artifact, reference: ReferenceFile | None) -> StructureReport:
    """Lowers the graph again and compares the artifact's; without torch, compares a fingerprint."""
    expected, layers = expected_of(artifact.manifest.kind), artifact.manifest.config.num_layers
    recipe = expected.recipe(artifact.manifest)
    if recipe is None:
        return StructureReport("not checked", "graphs of this format are not compared")
    if layers > MOST_LAYERS:
        return StructureReport("not checked", f"{layers:,} layers; expected at most {MOST_LAYERS}")
    try:
        difference = _difference_from_lowered(expected, artifact, recipe)
        writer = version_text({"rgexport": __version__})
    except ImportError as error:
        missing = f"{error.name} is missing (pip install 'rgexport[{expected.extra}]')"
        if reference is None:
            return StructureReport("not checked", f"{missing}, and no reference file was given")
        recorded = [f for f in reference.header.structures if f.recipe == recipe.key]
        if not recorded:
            reason = "the reference file has no fingerprint for this config and plan"
            return StructureReport("not checked", f"{missing}, and {reason}")
        is_same = fingerprint(recipe.key, expected.read(artifact)).matches(recorded[-1])
        difference = None if is_same else "its fingerprint is not the reference file's"
        writer = version_text(reference.header.environment)
    if difference is None:
        return StructureReport("as written", f"as {writer} writes it")
    writers = expected.writers(artifact)
    if writers == {writer}:
        return StructureReport("differs", difference)
    names = " and ".join(sorted(writers))
    return StructureReport("other version", one_line(f"{names}, not {writer}; {difference}"))


def _difference_from_lowered(expected: Expected, artifact: Artifact, recipe: Recipe) -> str | None:
    try:
        with task("Lowering the graph again"):
            lowered = list(expected.lower(recipe))
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the manifest may have options that no export checks
        reason = str(error) or type(error).__name__
        return one_line(f"this version writes no graph for its config and plan: {reason}")
    return first_difference(expected.read(artifact), lowered)


def can_record() -> bool:
    return all(map(find_spec, ("torch", "onnx_ir")))


def record_structures(checkpoint: Checkpoint) -> tuple[Fingerprint, ...]:
    """Returns the fingerprints of all formats and named precisions; 12 s and 0.4 GB for a 2B."""
    fingerprints: dict[str, Fingerprint] = {}
    for kind in FORMATS:
        try:
            fingerprints |= {f.recipe: f for f in _record(expected_of(kind), checkpoint)}
        except ImportError as error:
            note(f"the file gets no fingerprints of {kind} graphs: {error.name} is missing")
    return tuple(fingerprints.values())


def _record(expected: Expected, checkpoint: Checkpoint) -> Iterator[Fingerprint]:
    recipes = list(expected.default_recipes(checkpoint))
    if not recipes:
        return
    with task("Recording the structure of graphs", len(recipes), "graphs") as advance:
        for recipe in recipes:
            try:
                yield fingerprint(recipe.key, expected.lower(recipe))
            except RequestError as error:
                detail(f"no fingerprint of {recipe.kind} with {recipe.options}: {error}")
            advance(1)
