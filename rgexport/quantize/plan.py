"""The quantization plan: which tensor is stored how."""

import json
from pathlib import Path
from typing import Any

from rgexport.errors import RequestError
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import QUANTIZABLE, model_tensors
from rgexport.quantize.scheme import (
    BLOCKS,
    Affine,
    Float,
    Ggml,
    Plan,
    Scheme,
    scheme_from_dict,
    scheme_to_dict,
)

PRECISIONS: dict[str, Scheme] = {
    "fp32": Float("float32"),
    "fp16": Float("float16"),
    "int8": Affine(8, 128, symmetric=True),
    "int4": Affine(4, 128, symmetric=False),
}
"""Precision word → scheme of the linears and the embedding, before block and symmetry."""

_FULL: tuple[Scheme, ...] = (Float("float32"), Ggml("f32"))
"""What a tensor that is never quantized may be stored as."""


def choose_scheme(precision: str, block: int = 128, symmetric: bool | None = None) -> Scheme:
    """The scheme behind a precision word; `symmetric` None leaves the word's own default.

    Raises:
        RequestError: an unknown word, or a block size that is not 32, 64 or 128.
    """
    if block not in BLOCKS:
        raise RequestError(
            f"--block-size is {block}; expected one of {', '.join(map(str, BLOCKS))}"
        )
    if precision not in PRECISIONS:
        raise RequestError(
            f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}"
        )
    scheme = PRECISIONS[precision]
    if isinstance(scheme, Float):
        return scheme
    chosen = {"block": block} | ({} if symmetric is None else {"symmetric": symmetric})
    return scheme_from_dict(scheme_to_dict(scheme) | chosen)


def make_plan(config: GriffinConfig, linear: Scheme, embedding: Scheme) -> Plan:
    """`linear` for the linears, `embedding` for the table, float32 for everything else."""
    by_role = {role: linear for role in QUANTIZABLE} | {"embedding": embedding}
    return {
        name: by_role.get(spec.role, Float("float32"))
        for name, spec in model_tensors(config).items()
    }


def precision_of(plan: Plan) -> str:
    """The word for a plan: that of the tensor in the fewest bits."""
    scheme = min(plan.values(), key=lambda scheme: scheme.bits_per_weight)
    if isinstance(scheme, Affine):
        return f"int{scheme.bits}"
    if isinstance(scheme, Ggml):
        return scheme.type
    return next(word for word, other in PRECISIONS.items() if other == scheme)


def load_plan(path: Path, config: GriffinConfig) -> Plan:
    """A plan from a JSON file: tensor name → scheme, as `rgexport inspect --json` prints it.

    Raises:
        RequestError: not JSON, a tensor that is missing or unknown, or one of the float32-only
            tensors in another scheme.
    """
    try:
        entries = json.loads(path.read_text())
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
    plan = {name: _read_scheme(path, name, fields) for name, fields in entries.items()}
    for name, scheme in plan.items():
        if tensors[name].role not in QUANTIZABLE and scheme not in _FULL:
            raise RequestError(
                f"the plan {path} stores {name} as {scheme_to_dict(scheme)}; "
                f"a {tensors[name].role} stays float32 in every format"
            )
    return plan


def _read_scheme(path: Path, name: str, fields: Any) -> Scheme:
    try:
        return scheme_from_dict(fields)
    except RequestError as error:
        raise RequestError(f"the plan {path}: {name}: {error}") from None
