"""Ops of our own domain, functions of standard ops that native kernels replace; fusion to them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir
from onnx import parser

from rgexport.export.manifest import StoredTensor
from rgexport.export.onnx.emitter import DTYPES, OPSET
from rgexport.export.onnx.model_file import DOMAIN
from rgexport.export.onnx.trust import MICROSOFT
from rgexport.export.program import Node, StepProgram
from rgexport.quantize.scheme import Affine

_SCAN = """
    last = Constant <value_ints = [-1]> ()
    position_zero = Constant <value_int = 0> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    is_first = Equal (position_ids, position_zero)
    first = Unsqueeze (is_first, last)

    minus_gate = Neg (recurrence_gate)
    odds = Exp (minus_gate)
    one_plus_odds = Add (one, odds)
    log_a = Div (decay, one_plus_odds)
    a_any = Exp (log_a)
    a = Where (first, zero, a_any)

    two = Constant <value_float = 2.0> ()
    log_a_squared = Mul (two, log_a)
    a_squared = Exp (log_a_squared)
    variance = Sub (one, a_squared)
    scale_any = Sqrt (variance)
    scale = Where (first, one, scale_any)

    i = Sigmoid (input_gate)
    gated = Mul (x, i)
    b = Mul (gated, scale)
    present, h = Scan <
        num_scan_inputs = 2, scan_input_axes = [1, 1], scan_output_axes = [1],
        body = recurrence (float[B, R] h_before, float[B, R] a_t, float[B, R] b_t)
            => (float[B, R] h_t, float[B, R] h_out)
        {
            decayed = Mul (a_t, h_before)
            h_t = Add (decayed, b_t)
            h_out = Identity (h_t)
        }
    > (state, a, b)
"""
"""`Sigmoid` would be shorter than `decay / (1 + exp(-gate))`, but for a closed gate runtimes
approximate it with a relative error of 2e-4, and there `log a` decides how long a state lasts."""

_UNGATED_SCAN = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
UngatedRgLruScan (x, input_gate, recurrence_gate, decay, position_ids, state) => (h, present)
{{{_SCAN}}}
"""
"""x, input_gate, recurrence_gate [B, T, R], decay = -8 softplus(a_param) [R], position_ids [B, T],
state [B, R] → h [B, T, R], present [B, R]; arXiv 2402.19427, eq. 1–4."""

_RG_LRU_SCAN = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
RgLruScan (
    x, input_weight, input_bias, recurrence_weight, recurrence_bias, decay, position_ids, state
) => (h, present, input_gate, recurrence_gate)
{{
    input_matrix = Cast <to = {int(DTYPES["float32"])}> (input_weight)
    recurrence_matrix = Cast <to = {int(DTYPES["float32"])}> (recurrence_weight)
    batch_tokens = Constant <value_ints = [0, 0]> ()
    heads_block = Shape <start = 0, end = 2> (input_weight)
    by_head = Concat <axis = 0> (batch_tokens, heads_block)
    like_x = Constant <value_ints = [0, 0, -1]> ()
    apart = Reshape (x, by_head)
    heads = Transpose <perm = [0, 2, 1, 3]> (apart)
    input_product = MatMul (heads, input_matrix)
    input_tokens = Transpose <perm = [0, 2, 1, 3]> (input_product)
    input_sum = Add (input_tokens, input_bias)
    input_gate = Reshape (input_sum, like_x)
    recurrence_product = MatMul (heads, recurrence_matrix)
    recurrence_tokens = Transpose <perm = [0, 2, 1, 3]> (recurrence_product)
    recurrence_sum = Add (recurrence_tokens, recurrence_bias)
    recurrence_gate = Reshape (recurrence_sum, like_x)
{_SCAN}}}
"""
"""The scan with its gates, each a batched `MatMul` with a matrix per block of channels: weights
[heads, block, block] in float32 or bfloat16, biases [heads, block], the others as above. The gates
are results too, to be compared with a reference."""


QUANT_LINEAR_LEVEL = 4

QUANT_LINEAR_SIZES = "N", "N2", "N3"  # attributes of QuantLinear: the number of rows of each matrix


def _quant_linear(matrices: int) -> str:
    """Returns the text of the product of x [B, T, K] with one to three matrices of one format.

    Inputs: x, then for each matrix data [N, blocks, block_size · bits / 8], scales [N, blocks],
    optional zero points, optional bias [N]; outputs y [B, T, N]. With two `digits`, native kernels
    round the rest of the activations once more and add both products.
    """
    numbers = range(1, matrices + 1)
    sizes = QUANT_LINEAR_SIZES[:matrices]
    inputs = [f"{part}{i}" for part in ("data", "scales", "zero_points", "bias") for i in numbers]
    products = [
        f"""
    wide_scales{i} = Cast <to = {int(DTYPES["float32"])}> (scales{i})
    y{i} = {MICROSOFT}.MatMulNBits <
        K: int = @K, N: int = @{size}, bits: int = @bits, block_size: int = @block_size,
        accuracy_level = {QUANT_LINEAR_LEVEL}
    > (x, data{i}, wide_scales{i}, zero_points{i}, , bias{i})"""
        for i, size in zip(numbers, sizes, strict=True)
    ]
    return f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{MICROSOFT}" : 1]>
QuantLinear{"" if matrices == 1 else matrices}
<K, {", ".join(sizes)}, bits, block_size, digits> (x, {", ".join(inputs)})
=> ({", ".join(f"y{i}" for i in numbers)})
{{{"".join(products)}
}}
"""


def _parsed(text: str) -> ir.Function:
    return ir.serde.deserialize_function(parser.parse_function(text))


RG_LRU_SCAN, UNGATED_SCAN = _parsed(_RG_LRU_SCAN), _parsed(_UNGATED_SCAN)
QUANT_LINEARS = tuple(
    _parsed(_quant_linear(matrices)) for matrices in range(1, len(QUANT_LINEAR_SIZES) + 1)
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
