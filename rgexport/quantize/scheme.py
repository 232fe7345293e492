"""Storage schemes: how one tensor is stored."""

import dataclasses
import re
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from rgexport.errors import RequestError
from rgexport.quantize.ggml_types import TYPES

FloatDtype = Literal["float32", "float16"]
_FLOAT_BITS = {"float32": 32.0, "float16": 16.0}


@dataclass(frozen=True)
class Float:
    """Floats in `dtype`."""

    dtype: FloatDtype
    kind: Literal["float"] = "float"
    algorithm: ClassVar[str] = "cast"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight."""
        return _FLOAT_BITS[self.dtype]

    @property
    def label(self) -> str:
        """For people: `float16`."""
        return self.dtype


@dataclass(frozen=True)
class Affine:
    """`bits`-bit integers with one scale per `block` columns of a row, or per row (None).

    `w ≈ (q - zero_point) * scale`, with q unsigned; a symmetric scheme has the zero point
    `2**(bits - 1)` everywhere, an asymmetric one stores an integer zero point per block.
    """

    bits: Literal[2, 3, 4, 8]
    block: int | None
    symmetric: bool
    scale: FloatDtype = "float32"
    algorithm: str = field(default="rtn", compare=False)
    """What chose the values, a key of `algorithms.ALGORITHMS`; not part of the layout."""
    kind: Literal["affine"] = "affine"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales and zero points of blocks included."""
        if self.block is None:
            return float(self.bits)
        zero_point = 0 if self.symmetric else self.bits
        return self.bits + (_FLOAT_BITS[self.scale] + zero_point) / self.block

    @property
    def label(self) -> str:
        """For people: `int4/128`, `int8/row` or `int8/32 asym`."""
        return f"int{self.bits}/{self.block or 'row'}" + ("" if self.symmetric else " asym")


@dataclass(frozen=True)
class Palette:
    """`bits`-bit indices into a table of `2**bits` values that `group` rows share."""

    bits: Literal[4] = 4
    group: int = 16
    lut: FloatDtype = "float16"
    algorithm: str = field(default="kmeans", compare=False)
    """See `Affine`."""
    kind: Literal["palette"] = "palette"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight; the tables are not counted."""
        return float(self.bits)

    @property
    def label(self) -> str:
        """For people: `pal4/16`."""
        return f"pal{self.bits}/{self.group}"


@dataclass(frozen=True)
class Ggml:
    """One of ggml's tensor types (`ggml_types.TYPES`), only for GGUF files."""

    type: str
    kind: Literal["ggml"] = "ggml"
    algorithm: ClassVar[str] = "ggml"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales and minimums included."""
        return TYPES[self.type].bits_per_weight

    @property
    def label(self) -> str:
        """For people: `q4_k`."""
        return self.type


Scheme = Float | Affine | Palette | Ggml
Plan = dict[str, Scheme]
"""Canonical tensor name → scheme, for every tensor of the model."""

BLOCKS = (16, 32, 64, 128)
"""Block sizes that a user may ask for."""
INT8_ROWS = Affine(8, None, symmetric=True)
"""One scale per row, the only int8 that integer matrix products can take."""

_KINDS = {scheme.kind: scheme for scheme in (Float, Affine, Palette, Ggml)}
_SIZES = range(1, 1 << 31)
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "block": (None, _SIZES),
    "symmetric": (False, True),
    "group": (_SIZES,),
    "algorithm": (re.compile("[a-z0-9_-]{1,32}"),),
    "type": tuple(TYPES),
}
"""Field → allowed values, ranges of integers, or patterns of words; other fields are literals."""


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """The fields of `scheme`, as JSON."""
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
    hints = get_type_hints(_KINDS[kind])
    for key, value in rest.items():
        allowed = (_ALLOWED.get(key) or get_args(hints[key])) if key in hints else ()
        if not any(_matches(value, one) for one in allowed):
            expected = ", ".join(map(_shown, allowed)) or "no such field"
            raise RequestError(f"a scheme has {key} = {value!r}; expected {expected}")
    try:
        return _KINDS[kind](**rest)
    except TypeError:
        known = [field.name for field in dataclasses.fields(_KINDS[kind])]
        raise RequestError(
            f"a scheme of kind {kind} has {', '.join(rest) or 'no fields'}; "
            f"expected {', '.join(known)}"
        ) from None


def _matches(value: Any, allowed: Any) -> bool:
    # JSON's 32.0 and 1 equal 32 and true, but are not what may be stored.
    if isinstance(allowed, range):
        return type(value) is int and value in allowed
    if isinstance(allowed, re.Pattern):
        return isinstance(value, str) and bool(allowed.fullmatch(value))
    return type(value) is type(allowed) and value == allowed


def _shown(allowed: Any) -> str:
    if isinstance(allowed, range):
        return "a whole number from 1 on"
    if isinstance(allowed, re.Pattern):
        return "a word"
    return "null" if allowed is None else str(allowed)
