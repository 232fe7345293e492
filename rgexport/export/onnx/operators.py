"""The ops that artifacts have, by profile, and the refusal of graphs with other ones."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError, one_line
from rgexport.export.manifest import Profile
from rgexport.export.onnx.model_file import MAX_NODES, subgraphs
from rgexport.export.onnx.native import DOMAIN

Ops = Mapping[str, frozenset[str]]
"""Domain → names of ops."""

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
"""Ops with kernels in ONNX Runtime's CPU builds, of which WASM is one."""
_NATIVE = frozenset(
    """
    AddRmsNorm CausalConv1d GeluMul LocalAttention QuantLinear QuantLinear2 QuantLinear3 RgLruScan
    RmsNorm SoftCap
    """.split()
)
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
        "": _EVERYWHERE | {"BitwiseOr", "BitwiseXor"},
        MICROSOFT: frozenset({"MatMulNBits"}),
        DOMAIN: _NATIVE,
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
_EARLIER = {DOMAIN: frozenset({"BlockDiagonalLinear"})}
"""Ops that only earlier versions wrote."""


def require_known_ops(path: Path, model: Any, profile: Profile) -> None:
    """Refuses a parsed model with an op that an exporter of this profile does not write.

    Raises:
        RequestError: there is such an op, or there are too many nodes.
    """
    known = OPERATORS[profile]
    for domain, op in _ops(path, model):
        if op not in known.get(domain, ()) and op not in _EARLIER.get(domain, ()):
            name = one_line(f"{domain or 'ai.onnx'}::{op}")
            raise RequestError(
                f"{path} has the op {name}, which rgexport does not write for the profile "
                f"{profile}: the file is not its export; if you trust who made it, pass "
                "--allow-foreign (in Python, allow_foreign=True)"
            )


def _ops(path: Path, model: Any) -> Iterator[tuple[str, str]]:
    """Domain and name of every op, also in functions and subgraphs."""
    waiting: list[Any] = [model.graph, *model.function]
    count = 0
    while waiting:
        nodes = waiting.pop().node
        count += len(nodes)
        if count > MAX_NODES:
            raise RequestError(f"{path} has more than {MAX_NODES} nodes; expected fewer")
        for node in nodes:
            domain = node.domain.decode(errors="replace")
            yield "" if domain == "ai.onnx" else domain, node.op_type.decode(errors="replace")
            waiting.extend(subgraphs(node))
