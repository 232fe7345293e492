"""An ONNX artifact: its files, the parts of its tensors, and its facts for `inspect`."""

import reprlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from operator import attrgetter
from typing import Any

from rgexport.errors import RequestError
from rgexport.export.artifact import Artifact
from rgexport.export.manifest import COLUMNS, Manifest, ValueRecord
from rgexport.export.onnx.model_file import read_graph, read_model
from rgexport.export.onnx.native import native_ops
from rgexport.export.row_groups import part_shapes_by_group
from rgexport.quantize.scheme import (
    BLOCKS,
    INT8_ROWS,
    Affine,
    Float,
    PartShapes,
    Scheme,
    Uniform,
)

BITS = (3, 4, 8)
"""Of integers in blocks; those of 3 are symmetric."""
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"


class OnnxArtifact(Artifact):
    """A folder with `model.onnx`, its data files and their manifest."""

    def complaints(self, verify: bool) -> list[str]:
        """Lists damaged files; the graph comes last, as a hash says more of an altered one."""
        return super().complaints(verify) or list(self._wrong_graph())

    def _wrong_graph(self) -> Iterator[str]:
        """Compares inputs and outputs of the graph with the manifest."""
        graph, io = read_model(read_graph(self.file(MODEL_FILE))), self.manifest.io
        yield from _differences("input", graph.inputs, io.inputs)
        yield from _differences("output", graph.outputs, io.outputs)

    def facts(self) -> dict[str, Any]:
        """Returns the profile, and the kernels that would run the graph on this machine."""
        ops = native_ops(self.file(MODEL_FILE))
        kernels = {"runs": ops.kernels, "reason": ops.reason}
        return {
            "profile": self.manifest.profile,
            "kernels": kernels | {"native": list(ops.native), "ops": ops.ops},
        }


def _differences(
    kind: str, values: Sequence[ValueRecord], expected: Sequence[ValueRecord]
) -> Iterator[str]:
    """Describes the first difference, whatever the order."""
    by_name = attrgetter("name")
    for value, right in zip_longest(sorted(values, key=by_name), sorted(expected, key=by_name)):
        if value != right:
            yield f"{MODEL_FILE}: {kind} {_describe(value)}; expected {_describe(right)}"
            return


def _describe(value: ValueRecord | None) -> str:
    return f"{value.name} {value.dtype} {reprlib.repr(value.shape)}" if value else "none"


def weight_files(manifest: Manifest) -> list[str]:
    """Returns the names of the files of the weights, in order."""
    stored_parts = (part for stored in manifest.tensors.values() for part in stored.parts.values())
    return list(dict.fromkeys(part.file for part in stored_parts))


def part_shapes(shape: tuple[int, ...], scheme: Scheme) -> PartShapes:
    """Returns the parts of a tensor that is stored by `scheme`.

    An int8 matrix with a scale per row is stored by columns, as `MatMulInteger` needs it; all
    others by rows.

    Raises:
        RequestError: ONNX does not have that scheme.
    """
    if scheme != INT8_ROWS and not is_storable(scheme):
        raise RequestError(f"{scheme.label} is a way to store weights that ONNX does not have")
    return part_shapes_by_group(shape, scheme, _group_part_shapes)


def _group_part_shapes(shape: tuple[int, ...], scheme: Uniform) -> PartShapes:
    shapes = scheme.part_shapes(shape)
    if scheme != INT8_ROWS:
        return shapes
    rows, columns = shape
    return {COLUMNS: ("uint8", (columns, rows)), "scales": shapes["scales"]}


def is_storable(scheme: Scheme) -> bool:
    """Whether ONNX has the scheme: floats, or blocks of some sizes and bits."""
    return all(map(_is_storable, scheme.uniform))


def _is_storable(scheme: Uniform) -> bool:
    if isinstance(scheme, Affine):
        has_bits = scheme.bits in BITS and (scheme.bits > 3 or scheme.symmetric)
        return scheme.block in BLOCKS and has_bits
    return isinstance(scheme, Float)
