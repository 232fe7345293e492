"""What type the results of an operation have, by the type of operation and its operands.

Written after the documentation of MIL's operations for iOS 18, and without a look at what made a
program: a declared type that differs from the one computed here is a mistake of the maker.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from rgexport.export.mil import algebra_rules as algebra
from rgexport.export.mil import movement_rules as movement
from rgexport.export.mil import picking_rules as picking
from rgexport.export.mil import pointwise_rules as pointwise
from rgexport.export.mil.program import UNKNOWN, TensorType
from rgexport.export.mil.signatures import (
    BOOL,
    FLOATS,
    NUMBERS,
    Arguments,
    Operands,
    Signature,
    fit,
)

Types: TypeAlias = list[TensorType] | None
"""Types of the results; None where they depend on what only running tells."""
Result: TypeAlias = Callable[[Arguments], Types]


@dataclass(frozen=True)
class Rule:
    """What an operation takes, and the types of what it gives."""

    signature: Signature
    result: Result


def _rules(words: str, signature: Signature, result: Result) -> dict[str, Rule]:
    return dict.fromkeys(words.split(), Rule(signature, result))


_FLOAT_FUNCTIONS = (
    "acos asin atan atanh ceil cos cosh erf exp floor relu relu6 round sigmoid silu sin sinh "
    "softplus softsign sqrt tan tanh"
)
_REDUCTIONS = " ".join(
    f"reduce_{word}"
    for word in (
        "l1_norm",
        "l2_norm",
        "log_sum",
        "log_sum_exp",
        "max",
        "mean",
        "min",
        "prod",
        "sum",
        "sum_square",
    )
)

RULES: dict[str, Rule] = {
    **_rules(_FLOAT_FUNCTIONS, pointwise.one(FLOATS), pointwise.same),
    **_rules("abs exp2 sign square", pointwise.one(NUMBERS), pointwise.same),
    **_rules("inverse log rsqrt", pointwise.ONE_WITH_EPSILON, pointwise.same),
    **_rules("leaky_relu", pointwise.LEAKY, pointwise.same),
    **_rules("clip", pointwise.CLIP, pointwise.clip),
    **_rules("gelu", pointwise.GELU, pointwise.gelu),
    **_rules("cast", pointwise.CAST, pointwise.cast),
    **_rules("logical_not", pointwise.one(BOOL), pointwise.same),
    **_rules(
        "add floor_div maximum minimum mod mul pow real_div sub",
        pointwise.two(NUMBERS),
        pointwise.stretched,
    ),
    **_rules(
        "equal greater greater_equal less less_equal not_equal",
        pointwise.two(NUMBERS),
        pointwise.compared,
    ),
    **_rules("logical_and logical_or logical_xor", pointwise.two(BOOL), pointwise.compared),
    **_rules("select", pointwise.SELECT, pointwise.selected),
    **_rules("identity", movement.IDENTITY, pointwise.same),
    **_rules("reshape", movement.RESHAPE, movement.reshape),
    **_rules("transpose", movement.TRANSPOSE, movement.transpose),
    **_rules("expand_dims", movement.EXPAND_DIMS, movement.expand_dims),
    **_rules("squeeze", movement.SQUEEZE, movement.squeeze),
    **_rules("reverse", movement.REVERSE, pointwise.same),
    **_rules("slice_by_index", picking.SLICE_BY_INDEX, picking.slice_by_index),
    **_rules("slice_by_size", picking.SLICE_BY_SIZE, picking.slice_by_size),
    **_rules("slice_update", picking.SLICE_UPDATE, picking.slice_update),
    **_rules("concat", movement.CONCAT, movement.concat),
    **_rules("stack", movement.STACK, movement.stack),
    **_rules("split", picking.SPLIT, picking.split),
    **_rules("pad", movement.PAD, movement.pad),
    **_rules("tile", movement.TILE, movement.tile),
    **_rules("fill", movement.FILL, movement.fill),
    **_rules("gather", picking.GATHER, picking.gather),
    **_rules("gather_along_axis", picking.GATHER_ALONG_AXIS, picking.gather_along_axis),
    **_rules("linear", algebra.LINEAR, algebra.linear),
    **_rules("matmul", algebra.MATMUL, algebra.matmul),
    **_rules(_REDUCTIONS, algebra.REDUCE, algebra.reduced),
    **_rules("reduce_argmax reduce_argmin", algebra.ARG_REDUCE, algebra.arg_reduced),
    **_rules("softmax", algebra.SOFTMAX, algebra.along_axis(-1)),
    **_rules("cumsum", algebra.CUMSUM, algebra.along_axis(0)),
    **_rules("constexpr_blockwise_shift_scale", algebra.BLOCKWISE, algebra.blockwise),
    **_rules("constexpr_lut_to_dense", algebra.LUT, algebra.lut),
    **_rules("read_state", algebra.READ_STATE, algebra.read_state),
    **_rules("write_state", algebra.WRITE_STATE, algebra.write_state),
}
"""Type of operation → its rule. `const` has none: its type is that of its value."""

WITHOUT_RULE = frozenset(
    (
        "affine argsort avg_pool band_part batch_norm batch_to_space clamped_relu classify cond "
        "constexpr_affine_dequantize constexpr_cast constexpr_lut_to_sparse "
        "constexpr_sparse_blockwise_shift_scale constexpr_sparse_to_dense conv conv_quantized "
        "conv_transpose crop crop_resize depth_to_space dequantize einsum elu fill_like flatten2d "
        "gather_nd gru instance_norm l2_norm l2_pool layer_norm linear_activation list_gather "
        "list_length list_read list_scatter list_write local_response_norm lstm make_list "
        "max_pool non_maximum_suppression non_zero one_hot pixel_shuffle pixel_unshuffle prelu "
        "quantize random_bernoulli random_categorical random_normal random_uniform range_1d "
        "resample reshape_like resize resize_bilinear resize_nearest_neighbor reverse_sequence rnn "
        "scaled_dot_product_attention scaled_tanh scatter scatter_along_axis scatter_nd shape "
        "sigmoid_hard sliding_windows softplus_parametric space_to_batch space_to_depth threshold "
        "thresholded_relu topk upsample_bilinear upsample_nearest_neighbor while_loop"
    ).split()
)
"""Operations that Core ML has and this table has not: what they give is believed."""


def result_types(kind: str, operands: Operands) -> Types:
    """Types of what an operation of type `kind` gives.

    Returns:
        None where they cannot be told: sizes that only running gives, or no rule.

    Raises:
        Misfit: it does not take such operands.
    """
    rule = RULES.get(kind)
    if rule is None:
        return None
    if any(UNKNOWN in operand.type.shape for bound in operands.values() for operand in bound):
        return None
    fit(rule.signature, operands)
    return rule.result(Arguments(operands))
