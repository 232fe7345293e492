"""Ops of our own domain, each with a body of standard ONNX ops.

A runtime that knows a native kernel of that name uses it; every other one runs the body.
"""

import onnx_ir as ir
from onnx import parser

from rgexport.export.onnx.graph import OPSET

DOMAIN = "ai.rgexport"

_RG_LRU_SCAN = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
RgLruScan (x, input_gate, recurrence_gate, decay, position_ids, state) => (h, present)
{{
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
        {{
            decayed = Mul (a_t, h_before)
            h_t = Add (decayed, b_t)
            h_out = Identity (h_t)
        }}
    > (state, a, b)
}}
"""
"""x, input_gate, recurrence_gate [B, T, R], decay = -8 softplus(a_param) [R], position_ids [B, T],
state [B, R] → h [B, T, R], present [B, R]; arXiv 2402.19427, eq. 1–4.

`Sigmoid` would be shorter than `decay / (1 + exp(-gate))`, but runtimes approximate it to 2e-4 of
itself for a closed gate, and there `log a` decides how much a long memory keeps."""


def functions() -> list[ir.Function]:
    """All functions of the domain."""
    return [ir.serde.deserialize_function(parser.parse_function(_RG_LRU_SCAN))]
