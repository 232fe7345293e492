"""Storage schemes of one tensor, as data."""

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rgexport.errors import RequestError
from rgexport.quantize.ggml_types import TYPES


@dataclass(frozen=True)
class Float:
    """Stored as it is, in `dtype`."""

    dtype: Literal["float32", "float16"]
    kind: Literal["float"] = "float"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight."""
        return {"float32": 32.0, "float16": 16.0}[self.dtype]

    @property
    def label(self) -> str:
        """For people: `float16`."""
        return self.dtype


@dataclass(frozen=True)
class Affine:
    """Unsigned `bits`-bit integers with one float32 scale per `block` columns of a row.

    `w ≈ (q - zero_point) * scale`; a symmetric scheme has the zero point `2**(bits - 1)`
    everywhere, an asymmetric one stores an integer zero point per block.
    """

    bits: Literal[4, 8]
    block: Literal[32, 64, 128]
    symmetric: bool
    algorithm: Literal["rtn"] = "rtn"
    kind: Literal["affine"] = "affine"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales and zero points included."""
        return self.bits + (32 + (0 if self.symmetric else self.bits)) / self.block

    @property
    def label(self) -> str:
        """For people: `int4/128` or `int8/32 asym`."""
        return f"int{self.bits}/{self.block}" + ("" if self.symmetric else " asym")


@dataclass(frozen=True)
class Ggml:
    """One of ggml's tensor types, by its name in `ggml_types.TYPES`; only GGUF files have it."""

    type: str
    kind: Literal["ggml"] = "ggml"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales and minimums included."""
        return TYPES[self.type].bits_per_weight

    @property
    def label(self) -> str:
        """For people: `q4_k`."""
        return self.type


Scheme = Float | Affine | Ggml
Plan = dict[str, Scheme]
"""Canonical tensor name → scheme, for every tensor of the model."""

BLOCKS = (32, 64, 128)
"""Weights that may share a scale."""

_KINDS: dict[str, type[Float] | type[Affine] | type[Ggml]] = {
    "float": Float,
    "affine": Affine,
    "ggml": Ggml,
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "dtype": ("float16", "float32"),
    "bits": (4, 8),
    "block": BLOCKS,
    "symmetric": (False, True),
    "algorithm": ("rtn",),
    "type": tuple(TYPES),
}


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """As plain JSON."""
    return asdict(scheme)


def scheme_from_dict(fields: Any) -> Scheme:
    """The inverse of `scheme_to_dict`.

    Raises:
        RequestError: an unknown kind, field or value.
    """
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RequestError(
            f"a scheme has kind {kind!r}; expected one of {', '.join(sorted(_KINDS))}"
        )
    rest = {key: value for key, value in fields.items() if key != "kind"}
    for key, value in rest.items():
        allowed = _ALLOWED.get(key, ())
        # JSON's 32.0 and 1 equal 32 and true, but are not what may be stored.
        if not any(value == a and type(value) is type(a) for a in allowed):
            expected = ", ".join(map(str, allowed)) or "no such field"
            raise RequestError(f"a scheme has {key} = {value!r}; expected {expected}")
    try:
        return _KINDS[kind](**rest)
    except TypeError:
        known = [field.name for field in dataclasses.fields(_KINDS[kind])]
        raise RequestError(
            f"a scheme of kind {kind} has {', '.join(rest) or 'no fields'}; "
            f"expected {', '.join(known)}"
        ) from None
