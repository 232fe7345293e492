"""Refuses a graph before an engine opens it: unknown ops, or tensors that no model has.

An engine would allocate tensors that follow from constants while it opens the file.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from rgexport.artifacts.artifact import Artifact
from rgexport.artifacts.manifest import Manifest
from rgexport.artifacts.onnx import model_file
from rgexport.artifacts.onnx.graph_sizes import check_sizes
from rgexport.artifacts.onnx.messages import parse_model, subgraphs
from rgexport.choices import Profile
from rgexport.errors import RequestError, one_line
from rgexport.quantize.schemes.two_level import PLANES

Ops = Mapping[str, frozenset[str]]
"""Domain → types of its ops; the empty domain is ONNX's own, `ai.onnx`."""

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own ops, in every stock build."""

_EVERYWHERE = frozenset(
    """
    Abs Add And BitShift BitwiseAnd Cast Concat Constant Cos Div Equal Exp Expand Gather Gelu Gemm
    GreaterOrEqual Identity Less LessOrEqual MatMul Mod Mul Neg RMSNormalization Range Reshape
    RotaryEmbedding Scan ScatterND Shape Sigmoid Sin Slice Softmax Softplus Sqrt Squeeze Sub Tanh
    Transpose Unsqueeze Where
    """.split()
)
"""Ops with kernels in ONNX Runtime's CPU builds, including WASM."""

_TWO_LEVEL = frozenset(f"TwoLevelLinear{bits}" for bits in PLANES)
_TWO_LEVEL_EXACT = frozenset(f"{name}Exact" for name in _TWO_LEVEL)
_OTHER_NATIVE = frozenset(
    """
    AddRmsNorm CausalConv1d GeluMul LocalAttention QuantLinear QuantLinear2 QuantLinear3 RgLruScan
    RmsNorm SoftCap
    """.split()
)
_NATIVE = _OTHER_NATIVE | _TWO_LEVEL | _TWO_LEVEL_EXACT
"""Ops of rgexport's own kernels."""

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

_MOST_VIEWS = 4
"""Limit of how many times a graph may name the bytes of the weights; it names the embedding
twice."""

_ITEM_BYTES = {
    1: 4,  # FLOAT
    2: 1,  # UINT8
    3: 1,  # INT8
    4: 2,  # UINT16
    5: 2,  # INT16
    6: 4,  # INT32
    9: 1,  # BOOL
    10: 2,  # FLOAT16
    12: 4,  # UINT32
    16: 2,  # BFLOAT16
}
"""Number of a dtype in onnx.proto → bytes of an item; 8 for all others."""


class _Span(NamedTuple):
    """The bytes `start` to `stop` of a file."""

    file: str
    start: int
    stop: int


def require_trusted(artifact: Artifact, model: bytes) -> None:
    """Checks the graph of an artifact before an engine opens it.

    With the artifact's `allow_foreign`, any op and any place of the weights is accepted.

    Args:
        artifact: the artifact that the graph belongs to.
        model: the serialized model file.

    Raises:
        RequestError: the model is damaged, has an op that rgexport does not write for the
            artifact's profile, or a tensor that no model has.
    """
    path = artifact.file(model_file.MODEL_FILE)
    manifest = artifact.manifest
    try:
        message = parse_model(model)
    except DecodeError:
        raise RequestError(f"{path} is not an ONNX model, or is damaged") from None

    if not artifact.allow_foreign:
        _require_known_ops(path, message, manifest.profile)

    tensors: list[model_file.ExternalTensor] = []
    for scope in (message.graph, *message.function):
        tensors += check_sizes(path, scope)

    if not artifact.allow_foreign:
        _require_stored(path, tensors, manifest)
    _require_few_views(path, tensors, manifest)


def _require_known_ops(path: Path, model: Any, profile: Profile) -> None:
    for node in _nodes(path, model):
        operation = node.op_type.decode(errors="replace")
        domain = node.domain.decode(errors="replace")
        if domain == "ai.onnx":
            domain = ""
        if operation not in OPERATORS[profile].get(domain, ()):
            name = one_line(f"{domain or 'ai.onnx'}::{operation}")
            raise _not_ours(
                f"{path} has the op {name}, which rgexport does not write for the profile "
                f"{profile}: the file is not its export"
            )


def _nodes(path: Path, model: Any) -> Iterator[Any]:
    """Yields the nodes of the graph, of functions and of subgraphs; RequestError for too many."""
    scopes: list[Any] = [model.graph, *model.function]
    count = 0
    while scopes:
        nodes = scopes.pop().node
        count += len(nodes)
        if count > model_file.MAX_NODES:
            raise RequestError(f"{path} has more than {model_file.MAX_NODES} nodes; expected fewer")
        for node in nodes:
            yield node
            scopes.extend(subgraphs(node))


def _require_stored(
    path: Path, tensors: Sequence[model_file.ExternalTensor], manifest: Manifest
) -> None:
    """Raises RequestError for a tensor that lies outside of the weights in the manifest."""
    spans = _weight_spans(manifest)
    for tensor in tensors:
        size = _nbytes(tensor)
        # The last weight that starts at the tensor's offset or before it.
        index = bisect_right(spans, _Span(tensor.file, tensor.offset, sys.maxsize)) - 1
        is_stored = (
            index >= 0
            and spans[index].file == tensor.file
            and tensor.offset + size <= spans[index].stop
        )
        if not is_stored:
            raise _not_ours(
                f"{path} has the tensor {one_line(tensor.name)} of {size} bytes, where "
                "rgexport.json has no weight of that size: the file is not rgexport's export"
            )


def _weight_spans(manifest: Manifest) -> list[_Span]:
    """Returns the bytes of each stored part, in ascending order."""
    spans = []
    for stored in manifest.tensors.values():
        for part in stored.parts.values():
            span = _Span(part.file, part.offset, part.offset + part.nbytes)
            spans.append(span)
    spans.sort()
    return spans


def _require_few_views(
    path: Path, tensors: Sequence[model_file.ExternalTensor], manifest: Manifest
) -> None:
    """Raises RequestError if a graph names its weights so often that a copy of each is too much."""
    size = sum(_nbytes(tensor) for tensor in tensors)
    total = sum(file.size for file in manifest.files.values())
    if size > _MOST_VIEWS * total:
        raise RequestError(
            f"{path} declares {size} bytes of weights in files of {total}; expected at most "
            f"{_MOST_VIEWS} times as many: export the model again"
        )


def _nbytes(tensor: model_file.ExternalTensor) -> int:
    return prod(tensor.shape) * _ITEM_BYTES.get(tensor.data_type, 8)


def _not_ours(complaint: str) -> RequestError:
    return RequestError(
        f"{complaint}; if you trust its maker, pass --allow-foreign (in Python, allow_foreign=True)"
    )
