"""Lowerings of the ops whose weights may be quantized: the embedding, the linears, the head."""

from collections.abc import Sequence

import numpy as np
from coremltools.converters.mil.mil import Var

from rgexport.export.coreml.emitter import Emitter
from rgexport.export.program import Node


def embedding(g: Emitter, node: Node) -> Sequence[Var]:
    """Rows of the table, as float32, times the scale."""
    ids, table = g.inputs(node)
    rows = g.cast(g.op("gather", x=table, indices=ids, axis=0), "float32")
    return [g.op("mul", x=rows, y=np.float32(node.attributes["scale"]))]


def linear(g: Emitter, node: Node) -> Sequence[Var]:
    """`x · weightᵀ + bias` in the activation dtype; the head is one over the embedding's table."""
    x, weight, bias = (None if value is None else g.value(value) for value in node.inputs)
    arguments = {} if bias is None else {"bias": bias}
    return [g.op("linear", x=g.cast(x, node.outputs[0].dtype), weight=weight, **arguments)]
