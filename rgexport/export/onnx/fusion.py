"""Fuses ops of a step program that one native kernel computes.

Each node costs a runtime some microseconds without memory traffic, in a decode step of thirty
milliseconds (2B).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from rgexport.export.manifest import StoredTensor
from rgexport.export.onnx.functions import QUANT_LINEARS
from rgexport.export.program import Node, StepProgram
from rgexport.quantize.scheme import Affine

Nodes = tuple[Node, ...]
Merges = Iterator[tuple[Node, set[str]]]
"""Merged nodes, each at the site of an old one, and the sites of the nodes that it replaces too."""


def fused(
    program: StepProgram, stored: Mapping[str, StoredTensor], *, rounded: bool
) -> StepProgram:
    """Merges ops into `gelu_mul`, `add_rms_norm`, `gated_rg_lru_scan` and `linears`.

    The first two only in float32. The residual sum stays a value of the program; nodes whose only
    reader was the fused op are removed. `linears` only where activations are `rounded` to int8,
    which the linears of one input then share.
    """
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
    """Merges linears of one input and one scheme, up to three, where the first one stands."""
    alike: dict[tuple[str, Affine], list[Node]] = {}
    for node in nodes:
        if node.op == "linear":
            x, weight, _ = node.inputs
            assert x is not None and weight is not None
            scheme = stored[weight.name].scheme
            if isinstance(scheme, Affine):
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
