"""Storage schemes: the registry, and the names that other packages import."""

import reprlib
from collections.abc import Iterable
from itertools import chain
from typing import Any

from rgexport.errors import RequestError
from rgexport.files.typed_json import register_reader
from rgexport.quantize.affine import BLOCKS, INT8_ROWS, Affine
from rgexport.quantize.floats import BFLOAT16, Float
from rgexport.quantize.ggml import Ggml
from rgexport.quantize.palette import Palette
from rgexport.quantize.row_groups import Mixed, RowGroup
from rgexport.quantize.scheme_base import FloatDtype, Parts, PartShapes, Scheme, Uniform

__all__ = [
    "BFLOAT16",
    "BLOCKS",
    "FLOAT32",
    "INT8_ROWS",
    "SCHEMES",
    "Affine",
    "Float",
    "FloatDtype",
    "Ggml",
    "Mixed",
    "Palette",
    "PartShapes",
    "Parts",
    "Plan",
    "RowGroup",
    "Scheme",
    "Uniform",
    "candidates",
    "coarsest",
    "scheme_from_dict",
]

Plan = dict[str, Scheme]
"""Canonical tensor name → scheme, for every tensor of the model."""

SCHEMES: dict[str, type[Scheme]] = {
    "float": Float,
    "affine": Affine,
    "palette": Palette,
    "ggml": Ggml,
    "mixed": Mixed,
}
"""Kind → scheme."""
FLOAT32 = Float("float32")


def scheme_from_dict(values: Any) -> Scheme:
    """Reads the result of `Scheme.to_dict`; RequestError for an unknown kind, field or value."""
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in SCHEMES:
        raise RequestError(
            f"a scheme has kind {reprlib.repr(kind)}; expected one of {', '.join(sorted(SCHEMES))}"
        )
    return SCHEMES[kind].from_dict(values)


register_reader(Scheme, scheme_from_dict)


def coarsest(schemes: Iterable[Scheme]) -> Uniform:
    """Returns the scheme with the fewest bits, of tensors and of row groups.

    `BFLOAT16` does not count: it is lossless.
    """
    uniform = chain.from_iterable(scheme.uniform for scheme in schemes)
    return min(
        (scheme for scheme in uniform if scheme != BFLOAT16),
        key=lambda scheme: scheme.bits_per_weight,
    )


def candidates() -> list[Uniform]:
    """Returns the schemes that plans for a target choose from; formats refuse what they lack."""
    return list(chain.from_iterable(scheme.candidates() for scheme in SCHEMES.values()))
