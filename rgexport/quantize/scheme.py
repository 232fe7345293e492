"""Storage schemes: how one tensor is stored."""

import dataclasses
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from rgexport.errors import RequestError
from rgexport.files.typed_json import register_reader
from rgexport.quantize.ggml_types import TYPES
from rgexport.quantize.row_ranges import count_rows, row_bounds

FloatDtype = Literal["float32", "float16"]
_FLOAT_BITS = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}


@dataclass(frozen=True)
class Float:
    """Floats in `dtype`."""

    dtype: Literal["float32", "float16", "bfloat16"]
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
    algorithm: str = field(default="ggml", compare=False)
    """See `Affine`."""
    kind: Literal["ggml"] = "ggml"

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales and minimums included."""
        return TYPES[self.type].bits_per_weight

    @property
    def label(self) -> str:
        """For people: `q4_k`."""
        return self.type


@dataclass(frozen=True)
class RowGroup:
    """Rows of a matrix that are stored alike, in their order."""

    rows: str | None
    """See `row_ranges`; None for all rows that no other group has."""
    scheme: Affine

    @property
    def label(self) -> str:
        """For people: `int8/128 (1,024 rows)`."""
        if self.rows is None:
            return self.scheme.label
        count = count_rows(row_bounds(self.rows))
        return f"{self.scheme.label} ({count:,} row{'s' if count > 1 else ''})"


@dataclass(frozen=True)
class Mixed:
    """Row groups of a matrix, each stored as a matrix of its own; see `row_groups`.

    The last group has the rows that no other has.
    """

    groups: tuple[RowGroup, ...]
    kind: Literal["mixed"] = "mixed"

    def each(self, change: Callable[[Affine], Affine]) -> "Mixed":
        """The same groups with changed schemes."""
        groups = (replace(group, scheme=change(group.scheme)) for group in self.groups)
        return Mixed(tuple(groups))

    @property
    def label(self) -> str:
        """For people: `int8/128 (1,024 rows) + int4/32`."""
        return " + ".join(group.label for group in self.groups)


Uniform = Float | Affine | Palette | Ggml
"""A scheme that all rows of a tensor share."""
Scheme = Uniform | Mixed
Plan = dict[str, Scheme]
"""Canonical tensor name → scheme, for every tensor of the model."""

BLOCKS = (16, 32, 64, 128)
"""Block sizes that a user may ask for."""
BFLOAT16 = Float("bfloat16")
"""For the matrices of gates that a checkpoint has in bfloat16: nothing is lost."""
INT8_ROWS = Affine(8, None, symmetric=True)
"""One scale per row, the only int8 that integer matrix products can take."""

MAX_GROUPS = 16
"""Row groups that a tensor may have: each is a product of its own."""

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


def uniform_schemes(scheme: Scheme) -> tuple[Uniform, ...]:
    """The scheme itself, or that of each row group."""
    if isinstance(scheme, Mixed):
        return tuple(group.scheme for group in scheme.groups)
    return (scheme,)


def coarsest(schemes: Iterable[Scheme]) -> Uniform:
    """The scheme with the fewest bits, of tensors and of row groups; `BFLOAT16` loses nothing."""
    uniform = (one for scheme in schemes for one in uniform_schemes(scheme) if one != BFLOAT16)
    return min(uniform, key=lambda scheme: scheme.bits_per_weight)


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """The fields of `scheme`, as JSON."""
    if isinstance(scheme, Mixed):
        return {"groups": [asdict(group) for group in scheme.groups], "kind": scheme.kind}
    return asdict(scheme)


def scheme_from_dict(fields: Any) -> Scheme:
    """The inverse of `scheme_to_dict`.

    Raises:
        RequestError: an unknown kind, field or value.
    """
    kind = fields.get("kind") if isinstance(fields, dict) else None
    if kind == Mixed.kind:
        return _mixed(fields)
    return _uniform(fields, kind)


register_reader(Scheme, scheme_from_dict)


def _uniform(fields: Any, kind: Any) -> Uniform:
    if not isinstance(kind, str) or kind not in _KINDS:
        expected = ", ".join(sorted([*_KINDS, Mixed.kind]))
        raise RequestError(f"a scheme has kind {kind!r}; expected one of {expected}")
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


def _mixed(fields: dict[str, Any]) -> Mixed:
    entries = fields.get("groups")
    entries = entries if isinstance(entries, list) else []
    count = len(entries)
    if fields.keys() != {"kind", "groups"} or not 2 <= count <= MAX_GROUPS:
        raise RequestError(
            f"a scheme of kind {Mixed.kind} has {', '.join(map(str, fields))} and {count} groups; "
            f"expected kind and groups, a list of 2 to {MAX_GROUPS}"
        )
    groups = tuple(map(_group, entries))
    if [group.rows is None for group in groups] != [False] * (count - 1) + [True]:
        raise RequestError(
            "of the groups of a scheme, the last has rows = null: all that no other group has; "
            'expected texts in the others, such as "0-255,300"'
        )
    return Mixed(groups)


def _group(fields: Any) -> RowGroup:
    if not isinstance(fields, dict) or fields.keys() != {"rows", "scheme"}:
        found = ", ".join(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
        raise RequestError(f"a row group has {found or 'no fields'}; expected rows and scheme")
    rows, inner = fields["rows"], fields["scheme"]
    if rows is not None and not isinstance(rows, str):
        raise RequestError(f"a row group has rows {reprlib.repr(rows)}; expected a text or null")
    if rows is not None:
        row_bounds(rows)
    kind = inner.get("kind") if isinstance(inner, dict) else None
    scheme = _uniform(inner, kind) if kind == Affine.kind else None
    if not isinstance(scheme, Affine):
        raise RequestError(
            f"a row group has a scheme of kind {reprlib.repr(kind)}; expected {Affine.kind}"
        )
    return RowGroup(rows, scheme)


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
