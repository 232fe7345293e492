"""Bounds the sizes of a graph's tensors from its constants, before an engine allocates them.

An engine computes whatever follows from constants while it opens a file, so a file of a few hundred
bytes can demand any amount of memory. The graph is read once, node by node: integer constants of
few items are followed through the ops that compute shapes, and every result gets a lower bound of
its number of elements.
"""

import operator
from collections import ChainMap
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from rgexport.artifacts.onnx.messages import LOCATIONS, subgraphs
from rgexport.artifacts.onnx.model_file import ExternalTensor, external_tensor
from rgexport.errors import RequestError, one_line

MOST_ELEMENTS = 1 << 28
"""Limit of the elements of a tensor that is no weight: 1 GiB in float32."""

_MOST_ITEMS = 64
"""Limit of the items of a constant that is read: sizes and shapes have few."""

_INTEGER_DTYPES = {6: "<i4", 7: "<i8"}
"""Number of an integer dtype in onnx.proto → its layout in `raw_data`."""

Sizes = Sequence[int | None]
"""The items of an integer tensor, in row-major order; None for each unknown one."""

_SAME_ITEMS = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Ops that return the items of their first input."""

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
}

_SHAPE_INPUTS = {"ConstantOfShape": 0, "Expand": 1, "Resize": 3}
"""Op → number of the input that holds the shape of its result."""

_NOT_SMALLER = {"Add", "Cast", "Identity", "Mul", "Tile"}
"""Ops with a result that has at least the elements of each input."""


def check_sizes(path: Path, scope: Any) -> list[ExternalTensor]:
    """Checks the tensors of a graph or of a function, and of its subgraphs.

    Args:
        path: the model file, for messages.
        scope: the protobuf message `Graph` or `Function`.

    Returns the tensors with data in other files: they are weights, and have no limit here.

    Raises:
        RequestError: a tensor has more than `MOST_ELEMENTS` elements, or a malformed shape.
    """
    return _Scope(path, ChainMap()).read(scope)


class _Scope:
    """Reads the tensors of one graph, subgraph or function body, in the order of its nodes.

    `known` maps names of integer tensors to their items. A subgraph sees the names of the graphs
    around it, but adds none to them.
    """

    def __init__(self, path: Path, outer: "ChainMap[bytes, Sizes | None]") -> None:
        self._path = path
        self._external: list[ExternalTensor] = []
        self._known = outer.new_child()
        self._least_elements: dict[bytes, int] = {}

    def read(self, scope: Any) -> list[ExternalTensor]:
        """Reads the message `Graph` or `Function`; returns its tensors in other files."""
        # A function has neither of these two fields.
        for tensor in getattr(scope, "initializer", ()):
            self._known[tensor.name] = self._read_tensor(tensor)
        for sparse in getattr(scope, "sparse", ()):
            self._require_small(prod(sparse.dims), "a sparse tensor")

        for node in scope.node:
            self._read_node(node)
        return self._external

    def _read_node(self, node: Any) -> None:
        operation = node.op_type.decode(errors="replace")
        inputs = [self._known.get(name) for name in node.input]

        sizes = self._read_constants(node)
        if operation != "Constant":
            sizes = _folded(operation, inputs)

        input_elements = [self._least_elements.get(name, 1) for name in node.input]
        elements = _least_elements(operation, inputs, input_elements)
        self._require_small(elements, operation)

        if node.output:
            name = node.output[0]
            self._known[name] = sizes
            self._least_elements[name] = elements

        for graph in subgraphs(node):
            inner = _Scope(self._path, self._known)
            self._external += inner.read(graph)

    def _read_constants(self, node: Any) -> Sizes | None:
        """Checks the tensors among a node's attributes; returns the items of a constant."""
        sizes: Sizes | None = None
        for attribute in node.attribute:
            self._require_small(prod(attribute.sparse.dims), "a sparse tensor")
            for tensor in (attribute.t, *attribute.tensors):
                sizes = self._read_tensor(tensor)
            if attribute.name == b"value_ints" and len(attribute.ints) <= _MOST_ITEMS:
                sizes = list(attribute.ints)
            elif attribute.name == b"value_int":
                sizes = [attribute.i]
        return sizes

    def _read_tensor(self, tensor: Any) -> Sizes | None:
        """Checks a tensor; returns its items if they are few integers in the model file."""
        if tensor.data_location == LOCATIONS["EXTERNAL"]:
            self._external.append(self._read_external(tensor))
            return None

        count = prod(tensor.dims)
        self._require_small(count, "a constant")

        dtype = _INTEGER_DTYPES.get(tensor.data_type)
        if dtype is None or not 0 <= count <= _MOST_ITEMS:
            return None
        if len(tensor.raw_data) == count * np.dtype(dtype).itemsize:
            return [int(item) for item in np.frombuffer(tensor.raw_data, dtype)]
        return [*tensor.int64_data[:count], *tensor.int32_data[:count]]

    def _read_external(self, tensor: Any) -> ExternalTensor:
        try:
            return external_tensor(tensor)
        except ValueError as error:
            raise RequestError(f"{self._path} is damaged: {error}") from None

    def _require_small(self, elements: int, source: str) -> None:
        if elements > MOST_ELEMENTS:
            raise RequestError(
                f"{self._path} declares {elements} elements in {one_line(source)}; expected at "
                f"most {MOST_ELEMENTS}: it is not a model that rgexport exports"
            )


def _folded(operation: str, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """Returns the items of a node's first result, as far as they follow from its inputs."""
    if operation in _SAME_ITEMS and inputs:
        return inputs[0]
    if operation == "Concat":
        return _concatenated(inputs)
    if operation in _ARITHMETIC and len(inputs) == 2:
        first, second = inputs
        if first is not None and second is not None:
            return _elementwise(_ARITHMETIC[operation], first, second)
    return None


def _concatenated(inputs: Sequence[Sizes | None]) -> Sizes | None:
    """Joins items; an unknown input counts as one unknown item, a scalar size in most graphs."""
    items: list[int | None] = []
    for sizes in inputs:
        if sizes is None:
            items.append(None)
        else:
            items.extend(sizes)
    if len(items) > _MOST_ITEMS:
        return None
    return items


def _elementwise(function: Callable[[int, int], int], first: Sizes, second: Sizes) -> Sizes:
    """Applies a function to pairs of items; one item alone is broadcast."""
    count = max(len(first), len(second))
    if len(first) == 1:
        first = list(first) * count
    if len(second) == 1:
        second = list(second) * count
    pairs = zip(first, second, strict=False)  # an engine will refuse other lengths
    return [_bounded(function, left, right) for left, right in pairs]


def _bounded(
    function: Callable[[int, int], int], left: int | None, right: int | None
) -> int | None:
    """Returns the function's value, cut to just outside the limit: products would grow forever."""
    if left is None or right is None:
        return None
    value = function(left, right)
    return max(-MOST_ELEMENTS - 1, min(value, MOST_ELEMENTS + 1))


def _least_elements(
    operation: str, inputs: Sequence[Sizes | None], input_elements: list[int]
) -> int:
    """Returns the least number of elements that a node's result can have.

    Args:
        operation: the type of the node.
        inputs: the known items of each input.
        input_elements: the least number of elements of each input.
    """
    elements = 1
    if operation == "Concat" and input_elements:
        elements = sum(input_elements)
    elif operation in _NOT_SMALLER and input_elements:
        elements = max(input_elements)

    shape_input = _SHAPE_INPUTS.get(operation)
    if shape_input is not None and shape_input < len(inputs):
        elements = max(elements, _product(inputs[shape_input]))
    elif operation == "Tile" and len(inputs) > 1:
        elements *= _product(inputs[1])
    elif operation == "OneHot" and len(inputs) > 1:
        elements = _product(inputs[1])
    elif operation == "Range" and len(inputs) == 3:
        elements = max(elements, _range_length(inputs))
    return elements


def _range_length(inputs: Sequence[Sizes | None]) -> int:
    """Returns the length of a `Range` from its start, limit and delta; 0 if one is unknown."""
    start, limit, delta = map(_first_item, inputs)
    if start is None or limit is None or not delta:
        return 0
    return (limit - start) // delta


def _first_item(sizes: Sizes | None) -> int | None:
    if not sizes:
        return None
    return sizes[0]


def _product(sizes: Sizes | None) -> int:
    """Multiplies the known sizes; sizes below 1 stand for unknown ones, as in `Reshape`."""
    product = 1
    for size in sizes or ():
        if size is not None:
            product *= max(1, size)
    return product
