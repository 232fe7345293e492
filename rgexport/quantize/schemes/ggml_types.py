"""ggml's tensor types (ggml.h, ggml-common.h), llama-quantize's file types and its choice of types.

The choice is `llama_tensor_get_type` in llama-quant.cpp, as far as it applies here: no experts, no
fused attention, a head tied to the embedding.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from rgexport.choices import plan_advice
from rgexport.errors import RequestError

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class GgmlType:
    """Rows in blocks of `block` weights in `block_bytes` bytes; `value` is of `enum ggml_type`."""

    name: str
    value: int
    block: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / self.block

    @property
    def is_quantized(self) -> bool:
        """Whether it has scales that several weights share."""
        return self.block > 1

    @property
    def has_codebook(self) -> bool:
        """Whether it is an i-quant: several weights share an index into a table of ggml's."""
        return self.name.startswith("iq")

    @property
    def needs_importances(self) -> bool:
        """Whether llama-quantize refuses it without an importance matrix, but for the embedding."""
        return self.name.startswith("iq2") or self.name == "iq3_xxs"

    def fits(self, columns: int) -> bool:
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Returns the bytes of a row; ValueError where it is not a whole number of blocks."""
        if not self.fits(columns):
            raise ValueError(f"{columns} weights are no whole number of {self.name} blocks")
        return columns // self.block * self.block_bytes


TYPES: dict[str, GgmlType] = {
    name: GgmlType(name, value, block, block_bytes)
    for name, value, block, block_bytes in (
        *(("f32", 0, 1, 4), ("f16", 1, 1, 2), ("bf16", 30, 1, 2), ("q8_0", 8, 32, 34)),
        *(("q4_0", 2, 32, 18), ("q4_1", 3, 32, 20), ("q5_0", 6, 32, 22), ("q5_1", 7, 32, 24)),
        *(("q2_k", 10, 256, 84), ("q3_k", 11, 256, 110), ("q4_k", 12, 256, 144)),
        *(("q5_k", 13, 256, 176), ("q6_k", 14, 256, 210)),
        *(("iq2_xxs", 16, 256, 66), ("iq2_xs", 17, 256, 74), ("iq2_s", 22, 256, 82)),
        *(("iq3_xxs", 18, 256, 98), ("iq3_s", 21, 256, 110)),
        *(("iq4_nl", 20, 32, 18), ("iq4_xs", 23, 256, 136)),
    )
}
"""Name → type; the names are ggml's in lower case."""

BY_VALUE: dict[int, GgmlType] = {row.value: row for row in TYPES.values()}


@dataclass(frozen=True)
class FileType:
    """The most frequent type, `default`, of a file; `value` is of `enum llama_ftype` (llama.h)."""

    name: str
    value: int
    default: str


_ROWS = (
    *(("f32", 0, "f32"), ("f16", 1, "f16"), ("bf16", 32, "bf16")),
    *(("q8_0", 7, "q8_0"), ("q6_k", 18, "q6_k"), ("q5_1", 9, "q5_1"), ("q5_0", 8, "q5_0")),
    *(("q5_k_m", 17, "q5_k"), ("q5_k_s", 16, "q5_k"), ("q4_1", 3, "q4_1"), ("q4_0", 2, "q4_0")),
    *(("q4_k_m", 15, "q4_k"), ("q4_k_s", 14, "q4_k"), ("q3_k_l", 13, "q3_k")),
    *(("q3_k_m", 12, "q3_k"), ("q3_k_s", 11, "q3_k"), ("q2_k", 10, "q2_k")),
    *(("iq4_nl", 25, "iq4_nl"), ("iq4_xs", 30, "iq4_xs"), ("iq3_m", 27, "iq3_s")),
    *(("iq3_s", 26, "iq3_s"), ("iq3_xs", 22, "iq3_s"), ("iq3_xxs", 23, "iq3_xxs")),
    *(("iq2_m", 29, "iq2_s"), ("iq2_s", 28, "iq2_xs")),
    *(("iq2_xs", 20, "iq2_xs"), ("iq2_xxs", 19, "iq2_xxs")),
)
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_BY_NAME = {name: FileType(name, value, default) for name, value, default in _ROWS}

FILE_TYPES: dict[str, FileType] = _BY_NAME | {a: _BY_NAME[name] for a, name in _ALIASES.items()}
"""llama-quantize's name in lower case → file type; aliases included."""


def find_type(name: str) -> GgmlType:
    """Returns the tensor type that a user names, in any case; RequestError for an unknown one."""
    return _find(TYPES, name, "tensor type")


def find_file_type(name: str) -> FileType:
    """Returns the file type that a user names, in any case; RequestError for an unknown one."""
    return _find(FILE_TYPES, name, "type")


def _find(table: dict[str, _Row], name: str, what: str) -> _Row:
    if name.lower() not in table:
        raise RequestError(
            f"unknown {what} {name!r}; expected one of {', '.join(table)}{plan_advice(name)}"
        )
    return table[name.lower()]


EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, kw_only=True)
class TypeRequest:
    """The types that a user asks for.

    `pure` gives every tensor the file type's default. The first of `overrides` (regex, tensor type)
    that matches a name counts. `token_embedding_type`, also of the head, has precedence over both.
    """

    file_type: FileType
    pure: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    token_embedding_type: str | None = None

    def __post_init__(self) -> None:
        """Refuses overrides that llama-quantize would ignore."""
        if self.overrides and not TYPES[self.file_type.default].is_quantized:
            raise RequestError(
                f"--tensor-type changes nothing in a file of type {self.file_type.name}; "
                "choose a --type of fewer bits beside it"
            )


def parse_override(text: str) -> tuple[str, str]:
    """Returns the regex, in lower case as llama-quantize reads it, and the type of `REGEX=TYPE`."""
    pattern, separator, kind = text.partition("=")
    if not pattern or not separator or not kind:
        raise RequestError(f"--tensor-type is {text!r}; expected REGEX=TYPE, as in attn_v=q8_0")
    try:
        re.compile(pattern.lower())
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError(f"--tensor-type {text!r} has no regular expression: {error}") from None
    return pattern.lower(), find_type(kind).name


def choose_types(
    columns: Mapping[str, int], request: TypeRequest, *, gqa: int, has_imatrix: bool
) -> dict[str, str]:
    """Returns name → type of quantizable tensors from their lengths of rows, in the file's order.

    `gqa` are the query heads per key head of the *first* layer, 0 if that is recurrent. Raises
    RequestError for an override that matches no tensor, and a type that needs importances.
    """
    for pattern, kind in request.overrides:
        if not any(re.search(pattern, name) for name in columns):
            raise RequestError(
                f"--tensor-type {pattern}={kind} matches no tensor that can be quantized; "
                f"their names are like {', '.join([*columns][:3])}"
            )
    counts, seen = Counter(map(_site, columns)), Counter[str]()
    file_type, types = request.file_type, dict[str, str]()
    for name in columns:
        site, requested = _site(name), _requested_type(name, request)
        if requested is not None:
            kind = requested
        elif name == EMBEDDING:
            # It is also the head, for which llama-quantize takes q6_k or better.
            is_coarse = file_type.default != "q8_0" and TYPES[file_type.default].fits(columns[name])
            coarse = "q5_k" if file_type.name in _COARSE_HEADS else "q6_k"
            kind = coarse if is_coarse else "q8_0"
        else:
            at = _Occurrence(seen[site], counts[site], gqa, has_imatrix)
            kind = _mixed_type(site, file_type, at)
            seen[site] += 1
        fallbacks = kind, _FALLBACKS.get(kind, "f16"), "f16"
        types[name] = kind = next(one for one in fallbacks if TYPES[one].fits(columns[name]))
        if TYPES[kind].needs_importances and not has_imatrix and name != EMBEDDING:
            raise RequestError(
                f"{name} would be {kind}, which needs importances; add --quality best, "
                "--calibration or --imatrix, or choose another type"
            )
    return types


def _mixed_type(site: str, file_type: FileType, at: "_Occurrence") -> str:
    for sites, names, rules in _MIXES:
        if site in sites.split() and file_type.name in names.split():
            kinds = (kind for condition, kind in rules.items() if _CONDITIONS[condition](at))
            return next(kinds, file_type.default)
    return file_type.default


def _requested_type(name: str, request: TypeRequest) -> str | None:
    if name == EMBEDDING and request.token_embedding_type is not None:
        return request.token_embedding_type
    overrides = (kind for pattern, kind in request.overrides if re.search(pattern, name))
    default = request.file_type.default
    fixed = request.pure or not TYPES[default].is_quantized
    return next(overrides, default if fixed else None)


def _site(name: str) -> str:
    return name.split(".")[-2]


@dataclass(frozen=True)
class _Occurrence:
    index: int
    count: int
    gqa: int
    has_imatrix: bool


def _gets_more_bits(at: _Occurrence) -> bool:
    """The first and the last eighth, and every third between them."""
    eighth = at.count // 8
    outer = at.index < eighth or at.index >= 7 * at.count // 8
    return outer or (at.index - eighth) % 3 == 2


_CONDITIONS: dict[str, Callable[[_Occurrence], bool]] = {
    "always": lambda at: True,
    "more bits": _gets_more_bits,
    "first 2": lambda at: at.index < 2,
    "first 4": lambda at: at.index < 4,
    "first 1/8": lambda at: at.index < at.count // 8,
    "first 1/16": lambda at: at.index < at.count // 16,
    "grouped": lambda at: at.gqa >= 4,
    # Importances of the first ffn_down can make types without a minimum very inexact.
    "imatrix": lambda at: at.has_imatrix and at.index < at.count // 8,
    "no imatrix": lambda at: not at.has_imatrix and at.index < at.count // 8,
    "inner 3/4": lambda at: at.count // 8 <= at.index < 7 * at.count // 8,
}
_COARSE_HEADS = "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs"
"""File types whose embedding, which is also the head, is q5_k."""
_MIXES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("attn_v", "q2_k", {"grouped": "q4_k", "always": "q3_k"}),
    ("attn_v", "q3_k_m", {"first 2": "q5_k", "always": "q4_k"}),
    ("attn_v", "q4_k_s", {"first 4": "q5_k"}),
    ("attn_v ffn_down", "q4_k_m q5_k_m", {"more bits": "q6_k"}),
    ("attn_v", "iq2_xxs iq2_xs", {"grouped": "q4_k", "always": "q2_k"}),
    ("attn_v", "iq2_s iq2_m", {"grouped": "q4_k", "always": "iq3_s"}),
    ("attn_v", "iq3_xxs iq3_xs iq3_s", {"grouped": "q4_k"}),
    ("attn_v", "iq4_nl iq4_xs", {"grouped": "q5_k"}),
    ("attn_v attn_output", "iq3_m", {"always": "q4_k"}),
    ("attn_q attn_k", "iq3_xxs", {"always": "iq2_s"}),
    ("attn_q attn_k", "iq3_xs", {"always": "iq3_xxs"}),
    ("ffn_gate ffn_up", "iq3_xs", {"inner 3/4": "iq3_xxs"}),
    ("attn_output ffn_down", "q2_k", {"always": "q3_k"}),
    ("attn_output", "q3_k_m", {"always": "q4_k"}),
    ("attn_v attn_output ffn_down", "q3_k_l", {"always": "q5_k"}),
    ("attn_output", "iq2_s iq2_m iq3_xxs", {"always": "iq3_s"}),
    ("ffn_down", "q3_k_m", {"first 1/16": "q5_k", "always": "q4_k"}),
    ("ffn_down", "q4_k_s", {"first 1/8": "q5_k"}),
    ("ffn_down", "q4_0", {"imatrix": "q4_1"}),
    ("ffn_down", "q5_0", {"imatrix": "q5_1"}),
    ("ffn_down", "iq2_xxs iq2_xs", {"first 1/8": "q2_k"}),
    ("ffn_down", "iq2_s iq2_m", {"first 1/8": "iq3_s"}),
    ("ffn_down", "iq3_m", {"first 1/8": "q4_k"}),
    ("ffn_down", "iq4_nl iq4_xs", {"no imatrix": "q5_k"}),
)
"""Sites, file types, and rules: the first condition that holds gives the type, else the default."""

_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_FALLBACKS |= {name: "iq4_nl" for name, kind in TYPES.items() if kind.has_codebook}
"""For rows that are not a multiple of 256; f16 if they are not a multiple of 32 either."""
