"""Which kernels compute the ops of our own domain in a model file, and why native ones do not.

Such an op is a function of the file, with a body of standard ops, which is what runs where nothing
else is known.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rgexport.export.onnx.model_file import ExternalTensor, ModelFile, read_model
from rgexport.kernels.onnx import library as build

DOMAIN, VERSION = "ai.rgexport", 2
SINCE = {"RgLruScan": 2}
"""Op → the version of the domain in which it became what kernels compute, if it is not the first:
of a file of an older version, the body runs."""
STOCK = "stock"
"""Says of a session that it runs the engine's own kernels."""
_SMALL = 1 << 16
"""Numbers of a tensor: engines read larger ones to pack them anew."""


@dataclass(frozen=True)
class NativeOps:
    """What there is for a model file on this machine."""

    ops: dict[str, int]
    """Op of our domain → how many nodes of the graph are of it."""
    native: tuple[str, ...]
    """Those of them that native kernels compute here; the bodies of the others run."""
    library: Path | None
    """What to register with the engine, if any is native."""
    kernels: str
    """`native` and the instruction set, or `stock`."""
    reason: str
    """Why it is `stock`; empty otherwise."""
    weights: tuple[ExternalTensor, ...] = ()
    """The tensors beside the file that are read where they lie, and that nothing packs anew."""
    small: tuple[ExternalTensor, ...] = ()
    """Those that the engine reads by itself, to fold them into constants."""


def native_ops(model: Path | bytes) -> NativeOps:
    """Looks at a model file, or a serialized model, and at the library of kernels.

    Raises:
        RequestError: the environment asks for an instruction set that does not exist.
    """
    read = read_model(model if isinstance(model, bytes) else model.read_bytes())
    ops = _own_ops(read)
    found, path = build.kernels(), build.library()
    version = read.versions.get(DOMAIN, VERSION)
    native = tuple(n for n in ops if n in found.ops and SINCE.get(n, 1) <= version)
    if native and path:
        kernels = f"native {found.instruction_set}"
        names = _read_in_place(read)
        weights = tuple(t for t in read.tensors if t.name in names)
        small = tuple(t for t in read.tensors if t.name not in names and prod(t.shape) < _SMALL)
        return NativeOps(ops, native, path, kernels, "", weights, small)
    reason = found.reason or f"the file has no op of {', '.join(sorted(found.ops))}"
    return NativeOps(ops, (), None, STOCK, reason)


def own_ops(model: bytes) -> dict[str, int]:
    """Counts the graph's nodes of our domain; of a damaged file, those before the damage."""
    return _own_ops(read_model(model))


def _own_ops(read: ModelFile) -> dict[str, int]:
    counts = Counter(node.op for node in read.nodes if node.domain == DOMAIN)
    return dict(sorted(counts.items()))


def _read_in_place(read: ModelFile) -> set[str]:
    """What nodes of our domain read, and `Gather`, which looks rows of the embedding up.

    Mapped apart from the head's, its pages would count twice in the memory of the process.
    """
    readers = (node for node in read.nodes if node.domain == DOMAIN or node.op == "Gather")
    return {name for node in readers for name in node.inputs}
