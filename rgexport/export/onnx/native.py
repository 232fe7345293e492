"""Which kernels compute the ops of our own domain in a model file, and why native ones do not.

Such an op is a model-local function with a body of standard ops, which runs where there is no
native kernel.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from rgexport.export.onnx.model_file import ExternalTensor, ModelFile, read_graph, read_model
from rgexport.kernels.onnx import library as build

DOMAIN, VERSION = "ai.rgexport", 2
SINCE = {"RgLruScan": 2}
"""Op → the version of the domain since which it is what the native kernels compute, if not 1. In a
file of an older version, its body runs."""
STOCK = "stock"
"""The word for the engine's own kernels."""
_PRODUCTS = {"MatMul", "MatMulNBits", "Gemm"}
"""Ops of the engine whose sums depend on the number of tokens."""
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
    """Up to so many tokens of a step, of all rows together, give the bits that each gives alone,
    if what is left to the engine does."""


def native_ops(model: Path | bytes) -> NativeOps:
    """What a model file, or a serialized model, needs, and what the library of kernels has.

    Raises:
        RequestError: the environment asks for an instruction set that does not exist.
    """
    read = read_model(model if isinstance(model, bytes) else read_graph(model))
    counts = Counter(node.op for node in read.nodes if node.domain == DOMAIN)
    ops = dict(sorted(counts.items()))
    found, path = build.kernels(), build.library()
    version = read.versions.get(DOMAIN, VERSION)
    native = tuple(n for n in ops if n in found.ops and SINCE.get(n, 1) <= version)
    if native and path:
        kernels = f"native {found.instruction_set}"
        names = _read_in_place(read)
        weights = tuple(t for t in read.tensors if t.name in names)
        small = tuple(t for t in read.tensors if t.name not in names and prod(t.shape) < _SMALL)
        others = len(native) < len(ops) or any(node.op in _PRODUCTS for node in read.nodes)
        exact = 1 if others else found.exact_tokens
        return NativeOps(ops, native, path, kernels, "", weights, small, exact)
    reason = found.reason or f"the file has no op of {', '.join(sorted(found.ops))}"
    return NativeOps(ops, (), None, STOCK, reason)


def _read_in_place(read: ModelFile) -> set[str]:
    """Inputs of nodes of our domain, and of the `Gather` that looks up rows of the embedding.

    The embedding is the head's table: mapped twice, its pages would count twice as memory.
    """
    readers = (node for node in read.nodes if node.domain == DOMAIN or node.op == "Gather")
    return {name for node in readers for name in node.inputs}
