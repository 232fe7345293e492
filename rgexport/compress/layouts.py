"""The layouts that a plan chooses from in each format, and the bytes that they take there."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from rgexport.errors import RequestError
from rgexport.export.format import folder_format
from rgexport.export.gguf.vocabulary import read_vocabulary
from rgexport.export.storage import Places
from rgexport.export.tokenizer import bytes_to_add
from rgexport.griffin.checkpoint import Checkpoint
from rgexport.griffin.layout import model_tensors
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.scheme import FLOAT32, Plan, Scheme, Uniform, candidates

Shape = tuple[int, ...]

_GRAPH_BYTES = {"onnx": 24_000, "coreml": 124_000}
"""Of a graph, or of a package's programs, and a manifest, for each layer."""
_WIDENING_BYTES = 6_300
"""Of the nodes that make 4 bits of 3, for each matrix or row group."""
_GGUF_TENSOR_BYTES = 96
"""Of a tensor's name, shape, type and offset."""


@dataclass(frozen=True)
class FormatLayouts:
    """What a format offers.

    Attributes:
        fit: a scheme as it is for a matrix of some shape; None where it does not fit.
        parts: dtype and shape of the parts of a tensor.
        alignment: of the parts of tensors in the file.
        header: bytes before each part.
        beside: bytes of all that is not weights, about.
        row_groups: whether the rows of a matrix may have several layouts.
        bfloat16_gates: whether matrices of gates may be bfloat16.
        schemes: to choose from; `fit` leaves out what the format lacks.
    """

    fit: Callable[[Uniform, Shape], Uniform | None]
    parts: Callable[[Shape, Scheme], Mapping[str, tuple[str, Shape]]]
    alignment: int
    header: int
    beside: Callable[[Checkpoint], int]
    row_groups: bool = True
    bfloat16_gates: bool = False
    schemes: tuple[Uniform, ...] = tuple(candidates())

    def options(self, shape: Shape) -> dict[Uniform, int]:
        """The layouts that fit a matrix, each once, with its bytes; float32 if none does."""
        fits = [self.fit(scheme, shape) for scheme in self.schemes]
        found = [one for one in fits if one is not None] or [FLOAT32]
        return {one: self._nbytes(shape, one) for one in found}

    def artifact_bytes(self, plan: Plan, checkpoint: Checkpoint) -> int:
        """Bytes of an artifact, to within a few kB for each layer."""
        shapes = {name: spec.shape for name, spec in model_tensors(checkpoint.config).items()}
        places = Places("", self.alignment, header=self.header)
        places.tensors(plan, shapes, self.parts)
        listed = sum(_bytes_beside(scheme, shapes[name][0]) for name, scheme in plan.items())
        return places.size + listed + self.beside(checkpoint)

    def _nbytes(self, shape: Shape, scheme: Scheme) -> int:
        parts = self.parts(shape, scheme).values()
        return sum(prod(rows) * np.dtype(dtype).itemsize for dtype, rows in parts)


def layouts_of(kind: str) -> FormatLayouts:
    """What a format offers.

    Raises:
        RequestError: there is no such format.
    """
    if kind not in _FORMATS:
        raise RequestError(f"--format is {kind!r}; expected one of {', '.join(_FORMATS)}")
    return _FORMATS[kind]


def _in_folder(kind: str, fit: Callable[[Uniform, Shape], Uniform]) -> FormatLayouts:
    form = folder_format(kind)
    assert form is not None

    def fitting(scheme: Uniform, shape: Shape) -> Uniform | None:
        with suppress(RequestError):
            fits = fit(scheme, shape)
            form.part_layouts(shape, fits)
            return fits
        return None

    alignment, header = _ALIGNMENTS[kind]
    return FormatLayouts(
        fitting,
        form.part_layouts,
        alignment,
        header,
        partial(_folder_bytes, kind),
        bfloat16_gates=kind == "onnx",
    )


def _fitting_ggml(scheme: Uniform, shape: Shape) -> Uniform | None:
    kind = scheme.ggml_type
    return scheme if kind and shape[0] > 1 and TYPES[kind].fits(shape[1]) else None


def _ggml_parts(shape: Shape, scheme: Scheme) -> dict[str, tuple[str, Shape]]:
    kind = TYPES[scheme.ggml_type or "f32"]
    return {"data": ("uint8", (shape[0], kind.row_bytes(prod(shape[1:]))))}


def _bytes_beside(scheme: Scheme, rows: int) -> int:
    """What a tensor takes beside its parts.

    The nodes that widen integers of 3 bits; of row groups their rows, which a manifest lists twice,
    and the place of each row in the graph.
    """
    widened = sum(one.level_bits == 3 for one in scheme.uniform) * _WIDENING_BYTES
    return widened + scheme.index_bytes(rows)


def _folder_bytes(kind: str, checkpoint: Checkpoint) -> int:
    """Of a tokenizer, a graph and a manifest."""
    tokenizer = sum(path.stat().st_size for path in checkpoint.tokenizer_files)
    tokenizer += bytes_to_add(checkpoint.tokenizer_files)
    return tokenizer + _GRAPH_BYTES[kind] * checkpoint.config.num_layers


def _metadata_bytes(checkpoint: Checkpoint) -> int:
    """Of a vocabulary, with a length, a score and a type for each token, and of a manifest."""
    vocabulary = read_vocabulary(checkpoint.tokenizer_files, checkpoint.config.vocab_size)
    tokens = [] if vocabulary is None else vocabulary.tokens
    tensors = _GGUF_TENSOR_BYTES * len(model_tensors(checkpoint.config))
    return tensors + sum(len(token.encode()) + 16 for token in tokens)


_ALIGNMENTS = {"onnx": (4096, 0), "coreml": (64, 64)}
"""Of a part in the file of the weights, and the bytes before it."""
_FORMATS = {
    "onnx": _in_folder("onnx", lambda scheme, shape: scheme),
    "coreml": _in_folder("coreml", lambda scheme, shape: scheme.fitted(shape)),
    "gguf": FormatLayouts(
        *(_fitting_ggml, _ggml_parts, 32, 0, _metadata_bytes),
        row_groups=False,
    ),
}
