"""Ops of our own domain, functions of standard ops that native kernels replace; fusion to them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import onnx_ir as ir
from onnx import parser

from rgexport.artifacts.manifest import StoredTensor
from rgexport.artifacts.onnx.model_file import DOMAIN
from rgexport.artifacts.onnx.trust import MICROSOFT
from rgexport.export.onnx.emitter import DTYPES, OPSET
from rgexport.export.program import Node, StepProgram
from rgexport.quantize.schemes.registry import Scheme, TwoLevel
from rgexport.quantize.schemes.two_level import PLANES, RUN
from rgexport.reporting.text_templates import render_text

QUANT_LINEAR_SIZES = "N", "N2", "N3"  # attributes of QuantLinear: the number of rows of each matrix


def _function(template: str, **facts: Any) -> ir.Function:
    float32 = int(DTYPES["float32"])
    facts |= {"domain": DOMAIN, "opset": OPSET, "microsoft": MICROSOFT, "float32": float32}
    text = render_text("rgexport.export", template, **facts)
    return ir.serde.deserialize_function(parser.parse_function(text))


RG_LRU_SCAN = _function("rg_lru_scan.onnx.j2", gated=True)
UNGATED_SCAN = _function("rg_lru_scan.onnx.j2", gated=False)
QUANT_LINEARS = [
    _function("quant_linear.onnx.j2", sizes=QUANT_LINEAR_SIZES[:count])
    for count in range(1, len(QUANT_LINEAR_SIZES) + 1)
]

EXACT = 1  # accuracy level of `MatMulNBits` with float32 activations


@cache
def two_level_linear(bits: int, *, rounded: bool) -> ir.Function:
    """Returns the product with `TwoLevel` weights; only the rounded one has a native kernel."""
    planes, scheme = PLANES[bits], TwoLevel(bits, RUN)  # type: ignore[arg-type]
    count = planes[-1].groups  # cuts of a row: the groups of the finest plane
    pieces = [count // plane.groups for plane in planes]
    of_planes = list(zip(accumulate(pieces, initial=0), pieces, planes, strict=False))
    cuts = [
        [
            (i + cut % n, (right := cut // n * p.step) - p.shift, p.mask << right)
            for i, n, p in of_planes
        ]
        for cut in range(count)
    ]
    middle = 0 if bits == scheme.unpacked_bits else 2 ** (bits - 1)
    middle *= 0x11 if scheme.unpacked_bits == 4 else 1
    numbers = {abs(n) for cut in cuts for _, *pair in cut for n in pair} | {middle}
    return _function(
        "two_level_linear.onnx.j2",
        name=f"TwoLevelLinear{bits}{'' if rounded else 'Exact'}",
        **{"numbers": sorted(numbers), "cuts": cuts, "middle": middle, "run": RUN},
        **{"pieces": sum(pieces), "unpacked_bits": scheme.unpacked_bits, "rounded": rounded},
    )


Nodes = tuple[Node, ...]
Merges = Iterator[tuple[Node, set[str]]]
"""Merged nodes, each at the site of an old one, and the sites of the nodes that it replaces too."""


def fused(
    program: StepProgram, stored: Mapping[str, StoredTensor], *, rounded: bool
) -> StepProgram:
    """Merges ops into functions; linears of one input if activations are `rounded` to int8."""
    nodes = program.nodes
    for rule in (_merge_gelu, _merge_norms, _merge_gates):
        nodes = _apply(nodes, rule(nodes))
    if rounded:
        nodes = _apply(nodes, _merge_linears(nodes, stored))
    return replace(program, nodes=nodes)


def _apply(nodes: Nodes, merges: Merges) -> Nodes:
    merged, gone = {}, set[str]()
    for node, sites in merges:
        merged[node.site] = node
        gone |= sites
    return tuple(merged.get(node.site, node) for node in nodes if node.site not in gone)


def _merge_gelu(nodes: Nodes) -> Merges:
    uses = Counter(value.name for node in nodes for value in node.tensors)
    gelus = {n.outputs[0].name: n for n in nodes if n.op == "gelu" and _float32(n)}
    for node in nodes:
        if node.op != "mul" or not _float32(node):
            continue
        first, second = node.tensors
        for gate, up in ((first, second), (second, first)):
            if gate.name in gelus and uses[gate.name] == 1 and gate.shape == up.shape:
                gelu = gelus[gate.name]
                yield replace(node, op="gelu_mul", inputs=(*gelu.inputs, up)), {gelu.site}
                break


def _merge_norms(nodes: Nodes) -> Merges:
    norms = {n.tensors[0].name: n for n in reversed(nodes) if n.op == "rms_norm" and _float32(n)}
    for node in nodes:
        norm = norms.get(node.outputs[0].name)
        if node.op == "add" and norm and _float32(node):
            merged = replace(
                node,
                op="add_rms_norm",
                inputs=(*node.inputs, norm.inputs[1]),
                attributes=norm.attributes,
                outputs=(*node.outputs, *norm.outputs),
            )
            yield merged, {norm.site}


def _merge_gates(nodes: Nodes) -> Merges:
    gates = {n.outputs[0].name: n for n in nodes if n.op == "block_diagonal_linear"}
    for node in nodes:
        if node.op == "rg_lru_scan":
            x, input_gate, recurrence_gate, *rest = node.tensors
            both = gates[input_gate.name], gates[recurrence_gate.name]
            weights = [weight for gate in both for weight in gate.tensors[1:]]
            outputs = (*node.outputs, *(gate.outputs[0] for gate in both))
            inputs = (x, *weights, *rest)
            merged = replace(node, op="gated_rg_lru_scan", inputs=inputs, outputs=outputs)
            yield merged, {gate.site for gate in both}


def _merge_linears(nodes: Nodes, stored: Mapping[str, StoredTensor]) -> Merges:
    alike: dict[tuple[str, Scheme], list[Node]] = {}
    for node in nodes:
        if node.op == "linear":
            x, weight, _ = node.inputs
            assert x is not None and weight is not None
            scheme = stored[weight.name].scheme
            if scheme.has_matmul_nbits_layout:
                alike.setdefault((x.name, scheme), []).append(node)
    size = len(QUANT_LINEARS)
    batches = (g[start : start + size] for g in alike.values() for start in range(0, len(g), size))
    for first, *rest in batches:
        if rest:
            columns = zip(*(node.inputs for node in (first, *rest)), strict=True)
            (x, *_), weights, biases = columns
            outputs = tuple(node.outputs[0] for node in (first, *rest))
            inputs = (x, *weights, *biases)
            merged = replace(first, op="linears", inputs=inputs, outputs=outputs)
            yield merged, {node.site for node in rest}


def _float32(node: Node) -> bool:
    return all(value.dtype == "float32" for value in (*node.tensors, *node.outputs))
