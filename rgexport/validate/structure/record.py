"""The fingerprints of structures in a reference file, for who cannot make the structures again."""

from collections.abc import Iterator
from importlib.util import find_spec

from rgexport.errors import RequestError
from rgexport.formats import FORMATS
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.progress import detail, note, task
from rgexport.quantize.plan import bfloat16_gates
from rgexport.validate.formats.expected import expected_of
from rgexport.validate.structure.elements import Fingerprint, fingerprint
from rgexport.validate.structure.format import Structure


def can_record() -> bool:
    """Whether the extra that lowers is installed."""
    return all(map(find_spec, ("torch", "onnx_ir")))


def record_structures(checkpoint: Checkpoint) -> tuple[Fingerprint, ...]:
    """The fingerprints of all formats and named precisions, with default options.

    A format whose extra is missing has none, and neither has a precision that a model is too large
    for. Those of a 2B take 12 s and 0.4 GB.
    """
    fingerprints: dict[str, Fingerprint] = {}
    for kind in FORMATS:
        if structure := expected_of(kind).structure:
            try:
                found = _record(structure, checkpoint)
                fingerprints |= {one.recipe: one for one in found}
            except ImportError as error:
                note(f"the file gets no fingerprints of {kind} graphs: {error.name} is missing")
    return tuple(fingerprints.values())


def _record(structure: Structure, checkpoint: Checkpoint) -> Iterator[Fingerprint]:
    gates = bfloat16_gates(checkpoint.config, checkpoint.weights)
    recipes = list(structure.defaults(checkpoint.config, gates))
    if not recipes:
        return
    with task("Recording the structure of graphs", len(recipes), "graphs") as advance:
        for recipe in recipes:
            try:
                yield fingerprint(recipe.key, structure.lower(recipe))
            except RequestError as error:
                detail(f"no fingerprint of {recipe.kind} with {recipe.options}: {error}")
            advance(1)
