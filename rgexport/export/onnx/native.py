"""Finds which native kernels compute the ops of our own domain in a model file.

Such an op is a model-local function with a body of standard ops, which runs where there is no
native kernel.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from rgexport.export.onnx.model_file import ExternalTensor, read_graph, read_model
from rgexport.kernels.onnx import library

DOMAIN, VERSION = "ai.rgexport", 2
SINCE = {"RgLruScan": 2}
"""Op → the first version of the domain that the native kernels implement, if not 1. For files of
older versions, the function's body runs."""
STOCK = "stock"
"""The word for the engine's own kernels."""
_PRODUCTS = {"MatMul", "MatMulNBits", "Gemm"}
"""Ops of the engine that sum in another order for other numbers of tokens."""
_SMALL = 1 << 16
"""Elements. A tensor of fewer is read to fold constants; a larger one is repacked."""


@dataclass(frozen=True)
class NativeOps:
    """The native kernels for a model file on this machine."""

    ops: dict[str, int] = field(default_factory=dict)
    """Op of our domain → the number of its nodes in the graph."""
    native: tuple[str, ...] = ()
    """The ops that native kernels compute; of the others, the bodies run."""
    library: Path | None = None
    """What to register with the engine, if any op is native."""
    kernels: str = STOCK
    """`native` and the instruction set, or `stock`."""
    reason: str = ""
    """Why it is `stock`; empty otherwise."""
    weights: tuple[ExternalTensor, ...] = ()
    """External tensors that kernels read in place: the engine does not repack them."""
    small: tuple[ExternalTensor, ...] = ()
    """External tensors that the engine reads by itself, to fold constants."""
    exact_tokens: int = 1
    """Largest step, in tokens of all rows, in which our kernels compute for a token the same bits
    as in a step of its own."""


def native_ops(model: Path | bytes) -> NativeOps:
    """Compares the ops of a model file, or a serialized model, with the ops of our library.

    Raises RequestError if the environment names an instruction set that does not exist.
    """
    file = read_model(model if isinstance(model, bytes) else read_graph(model))
    counts = Counter(node.op for node in file.nodes if node.domain == DOMAIN)
    ops = dict(sorted(counts.items()))
    kernels, path = library.kernels(), library.library()
    version = file.versions.get(DOMAIN, VERSION)
    native = tuple(n for n in ops if n in kernels.ops and SINCE.get(n, 1) <= version)
    if not native or not path:
        reason = kernels.reason or f"the file has no op of {', '.join(sorted(kernels.ops))}"
        return NativeOps(ops, reason=reason)
    # The embedding is the head's table: mapped twice, its pages would count twice as memory.
    readers = (node for node in file.nodes if node.domain == DOMAIN or node.op == "Gather")
    names = {name for node in readers for name in node.inputs}
    has_stock_sums = len(native) < len(ops) or any(node.op in _PRODUCTS for node in file.nodes)
    return NativeOps(
        ops,
        native,
        path,
        kernels=f"native {kernels.instruction_set}",
        weights=tuple(t for t in file.tensors if t.name in names),
        small=tuple(t for t in file.tensors if t.name not in names and prod(t.shape) < _SMALL),
        exact_tokens=1 if has_stock_sums else kernels.exact_tokens,
    )
