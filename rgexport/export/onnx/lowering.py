"""The lowering table: Griffin op → ONNX nodes."""

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from rgexport.export.onnx import attention_ops, linear_ops, pointwise_ops, recurrent_ops
from rgexport.export.onnx.emitter import Emitter
from rgexport.export.onnx.row_groups import by_groups
from rgexport.export.program import Node

Lowering = Callable[[Emitter, Node], Sequence[ir.Value]]
"""Adds the nodes of one op, and returns its results."""

LOWERINGS: dict[str, Lowering] = {
    "embedding": linear_ops.embedding,
    "rms_norm": pointwise_ops.rms_norm,
    "linear": linear_ops.linear,
    "linears": linear_ops.linears,
    "block_diagonal_linear": recurrent_ops.block_diagonal_linear,
    "gelu": pointwise_ops.gelu,
    "gelu_mul": pointwise_ops.gelu_mul,
    "add_rms_norm": pointwise_ops.add_rms_norm,
    "causal_conv1d": recurrent_ops.causal_conv1d,
    "rg_lru_scan": recurrent_ops.rg_lru_scan,
    "gated_rg_lru_scan": recurrent_ops.gated_rg_lru_scan,
    "rope": attention_ops.rope,
    "local_attention": attention_ops.local_attention,
    "add": pointwise_ops.elementwise("Add"),
    "mul": pointwise_ops.elementwise("Mul"),
    "last_tokens": pointwise_ops.last_tokens,
    "soft_cap": pointwise_ops.soft_cap,
}


def lower(emitter: Emitter, node: Node, lowerings: Mapping[str, Lowering]) -> None:
    """Adds the nodes of one op; its results get their names in the program."""
    with emitter.site(node.site):
        results = by_groups(emitter, node, lowerings[node.op])
    for declared, value in zip(node.outputs, results, strict=True):
        emitter.declare(declared, value)
