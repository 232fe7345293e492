"""Refuses a graph before an engine opens it: unknown ops, or tensors that no model has.

An engine would allocate tensors that follow from constants while it opens the file.
"""

import operator
import sys
from bisect import bisect_right
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.artifacts.onnx import model_file
from rgexport.choices import Profile
from rgexport.errors import RequestError, one_line
from rgexport.quantize.schemes.two_level import PLANES

Ops = Mapping[str, frozenset[str]]
MICROSOFT = "com.microsoft"  # domain of ONNX Runtime's own ops, in every stock build

_EVERYWHERE = frozenset(
    """
    Abs Add And BitShift BitwiseAnd Cast Concat Constant Cos Div Equal Exp Expand Gather Gelu Gemm
    GreaterOrEqual Identity Less LessOrEqual MatMul Mod Mul Neg RMSNormalization Range Reshape
    RotaryEmbedding Scan ScatterND Shape Sigmoid Sin Slice Softmax Softplus Sqrt Squeeze Sub Tanh
    Transpose Unsqueeze Where
    """.split()
)
"""Ops with kernels in ONNX Runtime's CPU builds, including WASM."""
_NATIVE = frozenset(
    """
    AddRmsNorm CausalConv1d GeluMul LocalAttention QuantLinear QuantLinear2 QuantLinear3 RgLruScan
    RmsNorm SoftCap
    """.split()
) | {f"TwoLevelLinear{bits}{exact}" for bits in PLANES for exact in ("", "Exact")}
_WEBGPU = frozenset(
    """
    Abs Add And Cast Concat Cos Div Equal Exp Expand Floor Gather Gelu Gemm GreaterOrEqual Identity
    Less LessOrEqual Log MatMul Mul Neg RMSNormalization Range Relu Reshape RotaryEmbedding
    ScatterND Shape Sigmoid Sin Slice Softmax Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where
    """.split()
)
"""Ops with kernels in onnxruntime-web 1.30."""

OPERATORS: Mapping[Profile, Ops] = {
    "cpu": {
        "": _EVERYWHERE | {"BitwiseOr", "BitwiseXor", "Split"},
        MICROSOFT: frozenset({"MatMulNBits"}),
        model_file.DOMAIN: _NATIVE,
    },
    "wasm": {
        "": _EVERYWHERE | {"MatMulInteger", "Max", "ReduceMax", "Round", "Split"},
        MICROSOFT: frozenset({"MatMulNBits"}),
    },
    "webgpu": {
        "": _WEBGPU,
        MICROSOFT: frozenset({"GatherBlockQuantized", "LinearAttention", "MatMulNBits"}),
    },
}
"""Profile → all ops that a graph may have, also in bodies of functions and in subgraphs."""

MOST_ELEMENTS = 1 << 28  # of a tensor that is no weight: a GB in float32
_VIEWS = 4  # how many times a graph may name the bytes of the weights; the embedding is named twice
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 9: 1, 10: 2, 12: 4, 16: 2}
"""Number of onnx.proto for a dtype → bytes of an item; 8 for all others."""
_SMALL = 64  # the most items of a constant that is read: sizes and shapes have few

Sizes = Sequence[int | None]  # the items of an integer tensor; None for those that are not known


def require_trusted(artifact: Artifact, model: bytes) -> None:
    """Raises RequestError for unknown ops unless `allow_foreign`, and for impossible tensors."""
    path, manifest = artifact.file(model_file.MODEL_FILE), artifact.manifest
    try:
        parsed = model_file.parse_model(model)
    except DecodeError:
        raise RequestError(f"{path} is not an ONNX model, or is damaged") from None
    if not artifact.allow_foreign:
        _require_known_ops(path, parsed, manifest.profile)
    tensors = []
    for scope in (parsed.graph, *parsed.function):
        tensors += _Scope(path, scope, ChainMap()).external
    if not artifact.allow_foreign:
        _require_stored(path, tensors, manifest)
    size, total = sum(map(_nbytes, tensors)), sum(file.size for file in manifest.files.values())
    if size > _VIEWS * total:
        raise RequestError(
            f"{path} declares {size} bytes of weights in files of {total}; expected at most "
            f"{_VIEWS} times as many: export the model again"
        )


def _require_known_ops(path: Path, model: Any, profile: Profile) -> None:
    queue: list[Any] = [model.graph, *model.function]
    count = 0
    while queue:
        nodes = queue.pop().node
        count += len(nodes)
        if count > model_file.MAX_NODES:
            raise RequestError(f"{path} has more than {model_file.MAX_NODES} nodes; expected fewer")
        for node in nodes:
            domain, op = (text.decode(errors="replace") for text in (node.domain, node.op_type))
            domain = "" if domain == "ai.onnx" else domain
            if op not in OPERATORS[profile].get(domain, ()):
                name = one_line(f"{domain or 'ai.onnx'}::{op}")
                raise _not_ours(
                    f"{path} has the op {name}, which rgexport does not write for the profile "
                    f"{profile}: the file is not its export"
                )
            queue.extend(model_file.subgraphs(node))


def _require_stored(
    path: Path, tensors: list[model_file.ExternalTensor], manifest: Manifest
) -> None:
    weights = [part for stored in manifest.tensors.values() for part in stored.parts.values()]
    spans = sorted((part.file, part.offset, part.offset + part.nbytes) for part in weights)
    for tensor in tensors:
        start, stop = tensor.offset, tensor.offset + _nbytes(tensor)
        before = bisect_right(spans, (tensor.file, start, sys.maxsize)) - 1
        file, _, end = spans[max(0, before)]
        if before < 0 or file != tensor.file or stop > end:
            raise _not_ours(
                f"{path} has the tensor {one_line(tensor.name)} of {_nbytes(tensor)} bytes, where "
                "rgexport.json has no weight of that size: the file is not rgexport's export"
            )


def _not_ours(complaint: str) -> RequestError:
    return RequestError(
        f"{complaint}; if you trust its maker, pass --allow-foreign (in Python, allow_foreign=True)"
    )


def _nbytes(tensor: model_file.ExternalTensor) -> int:
    return prod(tensor.shape) * _ITEM_BYTES.get(tensor.data_type, 8)


class _Scope:
    def __init__(self, path: Path, scope: Any, outer: "ChainMap[bytes, Sizes | None]") -> None:
        self._path = path
        self.external: list[model_file.ExternalTensor] = []
        self._known = outer.new_child()
        self._least: dict[bytes, int] = {}
        for tensor in getattr(scope, "initializer", ()):
            self._known[tensor.name] = self._tensor(tensor)
        for sparse in getattr(scope, "sparse", ()):
            self._require_small(prod(sparse.dims), "a sparse tensor")
        for node in scope.node:
            self._node(node)

    def _node(self, node: Any) -> None:
        inputs = [self._known.get(name) for name in node.input]
        operation = node.op_type.decode(errors="replace")
        sizes = self._constant(node)
        if operation != "Constant":
            sizes = _folded(operation, inputs)
        least = _least_elements(operation, inputs, [self._least.get(n, 1) for n in node.input])
        self._require_small(least, operation)
        for name in node.output[:1]:
            self._known[name], self._least[name] = sizes, least
        for graph in model_file.subgraphs(node):
            self.external += _Scope(self._path, graph, self._known).external

    def _constant(self, node: Any) -> Sizes | None:
        sizes: Sizes | None = None
        for attribute in node.attribute:
            self._require_small(prod(attribute.sparse.dims), "a sparse tensor")
            for tensor in (attribute.t, *attribute.tensors):
                sizes = self._tensor(tensor)
            if attribute.name == b"value_ints" and len(attribute.ints) <= _SMALL:
                sizes = list(attribute.ints)
            elif attribute.name == b"value_int":
                sizes = [attribute.i]
        return sizes

    def _tensor(self, tensor: Any) -> Sizes | None:
        if tensor.data_location == model_file.LOCATIONS["EXTERNAL"]:
            try:
                self.external.append(model_file.external_tensor(tensor))
            except ValueError as error:
                raise RequestError(f"{self._path} is damaged: {error}") from None
            return None
        dtype, count = {6: "<i4", 7: "<i8"}.get(tensor.data_type), prod(tensor.dims)
        self._require_small(count, "a constant")
        if dtype is None or not 0 <= count <= _SMALL:
            return None
        if len(tensor.raw_data) == count * np.dtype(dtype).itemsize:
            return [int(item) for item in np.frombuffer(tensor.raw_data, dtype)]
        return [*tensor.int64_data[:count], *tensor.int32_data[:count]]

    def _require_small(self, elements: int, of: str) -> None:
        if elements > MOST_ELEMENTS:
            raise RequestError(
                f"{self._path} declares {elements} elements in {one_line(of)}; expected at most "
                f"{MOST_ELEMENTS}: it is not a model that rgexport exports"
            )


_SAME = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_ARITHMETIC = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}
_SHAPES = {"ConstantOfShape": 0, "Expand": 1, "Resize": 3}
"""Op → its input that is the shape of its result."""
_GROWING: dict[str, Callable[[list[int]], int]] = {
    "Concat": sum,
    **dict.fromkeys(("Tile", "Identity", "Cast", "Add", "Mul"), max),
}
"""Op → how its result's size follows from those of its inputs."""


def _folded(operation: str, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """Returns the items of a node's first result, as far as they follow from its inputs."""
    if operation in _SAME:
        return inputs[0] if inputs else None
    if operation == "Concat":
        items = [item for sizes in inputs for item in ([None] if sizes is None else sizes)]
        return items if len(items) <= _SMALL else None
    if operation not in _ARITHMETIC or len(inputs) != 2:
        return None
    first, second = inputs
    if first is None or second is None:
        return None
    count = max(len(first), len(second))
    first, second = (list(x) * count if len(x) == 1 else x for x in (first, second))
    return [_computed(_ARITHMETIC[operation], a, b) for a, b in zip(first, second, strict=False)]


def _computed(function: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return None
    return max(-MOST_ELEMENTS - 1, min(function(a, b), MOST_ELEMENTS + 1))


def _least_elements(operation: str, inputs: list[Sizes | None], least: list[int]) -> int:
    """Returns the elements that a result has at least, as far as constants tell."""
    elements = _GROWING[operation](least) if operation in _GROWING and least else 1
    if _SHAPES.get(operation, len(inputs)) < len(inputs):
        elements = max(elements, _product(inputs[_SHAPES[operation]]))
    elif operation == "Tile" and len(inputs) > 1:
        elements *= _product(inputs[1])
    elif operation == "OneHot" and len(inputs) > 1:
        elements = _product(inputs[1])
    elif operation == "Range" and len(inputs) == 3:
        start, limit, delta = (items[0] if items else None for items in inputs)
        if start is not None and limit is not None and delta:
            elements = max(1, (limit - start) // delta)
    return elements


def _product(sizes: Sizes | None) -> int:
    """Multiplies the known sizes; those below 1 stand for others."""
    return prod(max(1, size) for size in sizes or () if size is not None)
