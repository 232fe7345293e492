"""The lowering table: Griffin op → MIL operations."""

from collections.abc import Callable, Sequence

from coremltools.converters.mil.mil import Var

from rgexport.export.coreml import attention_ops, linear_ops, pointwise_ops, recurrent_ops
from rgexport.export.coreml.emitter import Emitter
from rgexport.export.coreml.states import feature_name
from rgexport.export.program import Node

LOWERINGS: dict[str, Callable[[Emitter, Node], Sequence[Var | None]]] = {
    "embedding": linear_ops.embedding,
    "rms_norm": pointwise_ops.rms_norm,
    "linear": linear_ops.linear,
    "block_diagonal_linear": recurrent_ops.block_diagonal_linear,
    "gelu": pointwise_ops.gelu,
    "causal_conv1d": recurrent_ops.causal_conv1d,
    "rg_lru_scan": recurrent_ops.rg_lru_scan,
    "rope": attention_ops.rope,
    "local_attention": attention_ops.local_attention,
    "add": pointwise_ops.elementwise("add"),
    "mul": pointwise_ops.elementwise("mul"),
    "last_tokens": pointwise_ops.last_tokens,
    "soft_cap": pointwise_ops.soft_cap,
}


def lower(emitter: Emitter, node: Node) -> None:
    """Adds the operations of one op; its results get the names that the program gave them."""
    with emitter.site(feature_name(node.site)):
        results = LOWERINGS[node.op](emitter, node)
    for declared, value in zip(node.outputs, results, strict=True):
        if value is not None:
            emitter.declare(declared, value)
