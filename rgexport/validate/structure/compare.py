"""Compares an artifact's structure with the one that the exporter writes."""

from dataclasses import dataclass
from typing import Literal

from rgexport._version import __version__
from rgexport.errors import one_line
from rgexport.export.artifact import Artifact
from rgexport.progress import task
from rgexport.validate.formats.expected import expected_of
from rgexport.validate.reference.reference_file import ReferenceFile
from rgexport.validate.structure.elements import fingerprint, first_difference
from rgexport.validate.structure.format import Recipe, Structure, maker

MOST_LAYERS = 256
"""Layers of a model that is lowered again: seven times those of a 9B."""


@dataclass(frozen=True)
class StructureReport:
    """Whether an artifact's graph is the one that the exporter writes for its config and plan.

    `differs` is a fault. With `other version` the graph is another one than this version writes,
    but the artifact does not claim to be of this version. `reason` tells what was compared, or the
    first difference.
    """

    status: Literal["as written", "differs", "other version", "not checked"]
    reason: str

    @property
    def in_verdict(self) -> bool:
        """Whether the verdict depends on the structure, and not on a text alone."""
        return self.status in ("as written", "differs")


NOT_COMPARED = StructureReport("not checked", "nobody asked for it")


def compare_structure(artifact: Artifact, reference: ReferenceFile | None) -> StructureReport:
    """Makes the structure again, and compares it with the artifact's.

    Without the extra for that, the artifact's fingerprint is compared with the reference file's.

    Raises:
        RequestError: a file of the artifact cannot be read.
    """
    structure = expected_of(artifact.manifest.kind).structure
    layers = artifact.manifest.config.num_layers
    if structure is None:
        return StructureReport("not checked", "it is known for no artifact of this format")
    if layers > MOST_LAYERS:
        return StructureReport("not checked", f"{layers:,} layers; expected at most {MOST_LAYERS}")
    recipe = structure.recipe(artifact.manifest)
    try:
        difference = _difference_from_lowered(structure, artifact, recipe)
        writer = maker({"rgexport": __version__})
    except ImportError as error:
        install = f"{error.name} is missing (pip install 'rgexport[{structure.extra}]')"
        if reference is None:
            return StructureReport("not checked", f"{install}, and no reference file was given")
        known = {one.recipe: one for one in reference.header.structures}.get(recipe.key)
        if known is None:
            lack = "the reference file has no fingerprint for this config and plan"
            return StructureReport("not checked", f"{install}, and {lack}")
        same = fingerprint(recipe.key, structure.read(artifact)).matches(known)
        difference = None if same else "its fingerprint is not the reference file's"
        writer = maker(reference.header.environment)
    return _report(difference, writer, structure.made_by(artifact))


def _difference_from_lowered(
    structure: Structure, artifact: Artifact, recipe: Recipe
) -> str | None:
    """The first difference from what this version writes; None where there is none.

    Raises:
        ImportError: the extra is missing.
    """
    try:
        layers = recipe.config.num_layers
        with task("Lowering the graph again", layers, "layers") as advance:
            expected = list(structure.lower(recipe))
            advance(layers)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # what the manifest asks for may be beyond what an export checks
        what = str(error) or type(error).__name__
        return one_line(f"this version writes no graph for its config and plan: {what}")
    return first_difference(structure.read(artifact), expected)


def _report(difference: str | None, writer: str, makers: set[str]) -> StructureReport:
    if difference is None:
        return StructureReport("as written", f"as {writer} writes it")
    if makers == {writer}:
        return StructureReport("differs", difference)
    names = " and ".join(sorted(makers))
    return StructureReport("other version", one_line(f"{names}, not {writer}; {difference}"))
