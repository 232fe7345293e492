"""Lowering profiles: the ops that a runtime has, and the lowerings that differ for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from rgexport.choices import Profile
from rgexport.export.onnx import wasm_ops, webgpu_ops
from rgexport.export.onnx.lowering import LOWERINGS, Lowering
from rgexport.export.onnx.storage import FileLimit
from rgexport.export.onnx.trust import OPERATORS, Ops
from rgexport.quantize.plan import PRECISIONS, WEB_PRECISIONS
from rgexport.quantize.scheme import INT8_ROWS, FloatDtype, Plan, Scheme

WEB_FILES = FileLimit(filled=10**9, largest=2**30)
"""Browsers do not reliably allocate larger buffers. Only the embedding of a 9B in int8 exceeds 10⁹
bytes: it is in a file of its own, of 1,048,576,000."""

FINE_HEAD = {"int4": "int8"}
"""The embedding is the output head, too: in four bits it would make half of the loss, with a
quarter of the weights. Not for WebGPU, whose released kernels lack 8-bit `MatMulNBits`."""


@dataclass(frozen=True, kw_only=True)
class LoweringProfile:
    """How a step program becomes a graph for one kind of runtime."""

    name: Profile
    precision: str
    """The default precision word."""
    precisions: Mapping[str, Scheme] = field(default_factory=lambda: PRECISIONS)
    """Precision word → scheme, before options for block and symmetry."""
    embeddings: Mapping[str, str] = field(default_factory=dict)
    """Precision of the linears → that of the embedding, where it is not the same by default."""
    rows: Mapping[str, Scheme] = field(default_factory=dict)
    """Precision word → its scheme here, where the user asks for nothing that needs blocks."""
    lowerings: Mapping[str, Lowering] = field(default_factory=lambda: LOWERINGS)
    """Griffin op → its lowering."""
    accuracy_level: int = 1
    """Of `MatMulNBits`: 4 lets it round activations to int8, unless `--exact` is given."""
    bits: frozenset[int] = frozenset({4, 8})
    """Of integers in blocks."""
    scale: FloatDtype = "float32"
    """The dtype of the scales of blocks, where no plan gives another one."""
    even_zero_points: bool = False
    """Whether rows of the embedding with 4-bit zero points need an even number of blocks."""
    functions: bool = False
    """Whether ops of our own domain stay functions, which native kernels can replace; they may have
    gates in bfloat16."""
    files: FileLimit | None = None
    """How large the files of weights may be; None for no limit."""

    @property
    def ops(self) -> Ops:
        """All ops that the graph may have, also in bodies of functions and in subgraphs."""
        return OPERATORS[self.name]

    def is_exact(self, plan: Plan, exact: bool) -> bool:
        """Whether activations are never rounded to int8: with `--exact`, or by the plan."""
        return exact or (self.accuracy_level == 1 and INT8_ROWS not in plan.values())

    def require_allowed(self, model: ir.Model) -> None:
        """Asserts that a model has only ops of the profile: another one is a bug of ours."""
        scopes: list[tuple[str, ir.Function | ir.Graph]]
        scopes = [(f"{function.name}: ", function) for function in model.functions.values()]
        for prefix, scope in (*scopes, ("", model.graph)):
            for node in ir.traversal.RecursiveGraphIterator(scope):
                allowed = node.op_type in self.ops.get(node.domain, ())
                op = f"{node.domain or 'ai.onnx'}::{node.op_type}"
                assert allowed, f"{prefix}{node.name}: {op} is no op of the profile {self.name}"


PROFILES: dict[str, LoweringProfile] = {
    profile.name: profile
    for profile in (
        LoweringProfile(
            name="cpu",
            precision="int4",
            embeddings=FINE_HEAD,
            accuracy_level=4,
            bits=frozenset({3, 4, 8}),
            scale="float16",
            functions=True,
        ),
        LoweringProfile(
            name="wasm",
            precision="int8",
            precisions=WEB_PRECISIONS,
            embeddings=FINE_HEAD,
            rows={"int8": INT8_ROWS},
            lowerings=LOWERINGS | wasm_ops.LOWERINGS,
            files=WEB_FILES,
        ),
        LoweringProfile(
            name="webgpu",
            precision="int4",
            precisions=WEB_PRECISIONS,
            even_zero_points=True,  # for GatherBlockQuantized
            lowerings=LOWERINGS | webgpu_ops.LOWERINGS,
            files=WEB_FILES,
        ),
    )
}
"""Word of `--profile` → profile."""
