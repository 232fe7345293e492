"""The quantization plan: how each tensor is stored."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.files.paths import read_regular
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import QUANTIZABLE, TensorSpec, model_tensors
from rgexport.griffin.tensor import DTYPES, WeightSource
from rgexport.quantize.algorithms import require_known
from rgexport.quantize.row_groups import group_sizes
from rgexport.quantize.scheme import (
    BFLOAT16,
    BLOCKS,
    Affine,
    Float,
    Ggml,
    Mixed,
    Palette,
    Plan,
    Scheme,
    coarsest,
    scheme_from_dict,
    scheme_to_dict,
)

PRECISIONS: dict[str, Scheme] = {
    "fp32": Float("float32"),
    "fp16": Float("float16"),
    "int8": Affine(8, 128, symmetric=True),
    "int4": Affine(4, 32, symmetric=True),
}
"""Precision → scheme of the linears and the embedding, before options for block and symmetry."""
WEB_PRECISIONS: dict[str, Scheme] = PRECISIONS | {"int4": Affine(4, 128, symmetric=False)}
"""The same for browsers, whose scales are float32: there, small blocks cost another half bit."""
COREML_PRECISIONS: dict[str, Scheme] = {
    "fp32": Float("float32"),
    "fp16": Float("float16"),
    "int8": Affine(8, None, symmetric=True),
    "int4": Affine(4, 32, symmetric=True),
    "pal4": Palette(),
}
"""The same for Core ML, before it is fitted to each matrix and gets the dtype of scales."""

_FULL: tuple[Scheme, ...] = (Float("float32"), Ggml("f32"))
"""For tensors that are never quantized."""


def choose_scheme(
    precision: str,
    block: int | None = None,
    symmetric: bool | None = None,
    words: Mapping[str, Scheme] = PRECISIONS,
) -> Scheme:
    """The scheme of a precision; None leaves its default.

    Raises:
        RequestError: an unknown word, or a block size that is none of `BLOCKS`.
    """
    if block is not None and block not in BLOCKS:
        raise RequestError(
            f"--block-size is {block}; expected one of {', '.join(map(str, BLOCKS))}"
        )
    if precision not in words:
        raise RequestError(f"unknown precision {precision!r}; expected one of {', '.join(words)}")
    scheme = words[precision]
    if not isinstance(scheme, Affine):
        return scheme
    return replace(
        scheme,
        block=scheme.block if block is None else block,
        symmetric=scheme.symmetric if symmetric is None else symmetric,
    )


def choose_schemes(
    words: tuple[str, str],
    choose: Callable[[str, int | None, bool | None], Scheme],
    block: int | None,
    symmetric: bool | None,
) -> tuple[Scheme, Scheme]:
    """The schemes of the linears and of the embedding.

    Block and symmetry are those of the linears. The embedding has them too if it is stored in the
    same precision, or if the linears are not quantized; else it keeps the defaults of its own.

    Args:
        words: their precisions.
        choose: a precision, a block size and a symmetry → the scheme.
        block: `--block-size`.
        symmetric: `--symmetric` or `--asymmetric`.
    """
    linear, table = words
    chosen = choose(linear, block, symmetric)
    if table == linear or not isinstance(chosen, Affine):
        return chosen, choose(table, block, symmetric)
    return chosen, choose(table, None, None)


def make_plan(config: GriffinConfig, linear: Scheme, embedding: Scheme) -> Plan:
    """`linear` for the linears, `embedding` for the table, float32 for everything else."""
    by_role = {role: linear for role in QUANTIZABLE} | {"embedding": embedding}
    return {
        name: by_role.get(spec.role, Float("float32"))
        for name, spec in model_tensors(config).items()
    }


def bfloat16_gates(config: GriffinConfig, weights: WeightSource) -> frozenset[str]:
    """The matrices of gates, [heads, block, block], that the checkpoint has in bfloat16."""
    return frozenset(
        name
        for name, spec in model_tensors(config).items()
        if _is_gate_matrix(spec) and name in weights and weights[name].dtype == DTYPES["bfloat16"]
    )


def with_bfloat16(plan: Plan, names: Collection[str]) -> Plan:
    """The plan with bfloat16 for no other tensors than `names`: float32 for the rest of them."""
    return {
        name: Float("float32") if scheme == BFLOAT16 and name not in names else scheme
        for name, scheme in plan.items()
    }


def _is_gate_matrix(spec: TensorSpec) -> bool:
    return spec.role == "gate" and len(spec.shape) == 3


def is_linear_bias(name: str, tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether the tensor `name` is the bias of a linear."""
    weight = tensors.get(name.removesuffix("bias") + "weight")
    return name.endswith(".bias") and weight is not None and weight.role == "linear"


def precision_of(plan: Plan) -> str:
    """The precision of a plan: that of the tensor, or the row group, with the fewest bits."""
    scheme = coarsest(plan.values())
    if isinstance(scheme, Affine):
        return f"int{scheme.bits}"
    if isinstance(scheme, Palette):
        return f"pal{scheme.bits}"
    if isinstance(scheme, Ggml):
        return scheme.type
    return next(word for word, other in PRECISIONS.items() if other == scheme)


def load_plan(path: Path, config: GriffinConfig) -> Plan:
    """A plan from a JSON file: tensor name → scheme, as `rgexport inspect --json` prints it.

    Raises:
        RequestError: it is not JSON, a tensor is missing or unknown, one that must be float32
            has another scheme, or row groups do not fit the rows of their tensor.
    """
    try:
        entries = json.loads(read_regular(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"cannot read the plan {path}: {error}") from None
    if isinstance(entries, dict) and isinstance(entries.get("plan"), dict):
        entries = entries["plan"]
    tensors = model_tensors(config)
    if not isinstance(entries, dict) or entries.keys() != tensors.keys():
        found = set(entries) if isinstance(entries, dict) else set()
        differing = sorted(found ^ set(tensors))[:5]
        raise RequestError(
            f"the plan {path} does not name the tensors of this model (first differences: "
            f"{', '.join(differing)}); print a fitting one with `rgexport inspect ARTIFACT --json`"
        )
    plan = {
        name: _read_scheme(path, name, fields, tensors[name]) for name, fields in entries.items()
    }
    for name, scheme in plan.items():
        if rule := _broken_rule(name, scheme, tensors):
            stored = scheme_to_dict(scheme)
            raise RequestError(f"the plan {path} stores {name} as {stored}; {rule}")
    return plan


def _broken_rule(name: str, scheme: Scheme, tensors: Mapping[str, TensorSpec]) -> str | None:
    """The rule that a scheme breaks, if any."""
    role = tensors[name].role
    if role in QUANTIZABLE:
        return "only the matrices of gates may be bfloat16" if scheme == BFLOAT16 else None
    shorter = [Float("float16")] if is_linear_bias(name, tensors) else []
    shorter += [BFLOAT16] if _is_gate_matrix(tensors[name]) else []
    if scheme in (*_FULL, *shorter):
        return None
    allowed = " or ".join(["float32", *(one.dtype for one in shorter)])
    return f"a {role} is never quantized; expected {allowed}"


def _read_scheme(path: Path, name: str, fields: Any, spec: TensorSpec) -> Scheme:
    try:
        scheme = scheme_from_dict(fields)
        require_known(scheme)
        if isinstance(scheme, Mixed) and spec.role in QUANTIZABLE:
            group_sizes(scheme, spec.shape[0])
        return scheme
    except RequestError as error:
        raise RequestError(f"the plan {path}: {name}: {error}") from None
