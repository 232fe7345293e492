"""ggml's tensor types that are written (ggml.h, ggml-common.h), and llama-quantize's file types.

A file type names the type of most tensors of a GGUF file.
"""

from dataclasses import dataclass
from typing import TypeVar

from rgexport.errors import RequestError

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class GgmlType:
    """A type that stores rows in blocks of `block` weights in `block_bytes` bytes.

    `value` is the number of `enum ggml_type`, as a GGUF file has it.
    """

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

    def fits(self, columns: int) -> bool:
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Returns the bytes of a row; ValueError where it is not a whole number of blocks."""
        if not self.fits(columns):
            raise ValueError(f"{columns} weights are no whole number of {self.name} blocks")
        return columns // self.block * self.block_bytes


TYPES: dict[str, GgmlType] = {
    row.name: row
    for row in (
        GgmlType("f32", 0, 1, 4),
        GgmlType("f16", 1, 1, 2),
        GgmlType("bf16", 30, 1, 2),
        GgmlType("q4_0", 2, 32, 18),
        GgmlType("q4_1", 3, 32, 20),
        GgmlType("q5_0", 6, 32, 22),
        GgmlType("q5_1", 7, 32, 24),
        GgmlType("q8_0", 8, 32, 34),
        GgmlType("q2_k", 10, 256, 84),
        GgmlType("q3_k", 11, 256, 110),
        GgmlType("q4_k", 12, 256, 144),
        GgmlType("q5_k", 13, 256, 176),
        GgmlType("q6_k", 14, 256, 210),
    )
}
"""Name → type; the names are ggml's in lower case."""

BY_VALUE: dict[int, GgmlType] = {row.value: row for row in TYPES.values()}


@dataclass(frozen=True)
class FileType:
    """A value of `general.file_type`, a number of `enum llama_ftype` (llama.h).

    `default` is the type of all tensors for which the mix has no other.
    """

    name: str
    value: int
    default: str


_ROWS = (
    FileType("f32", 0, "f32"),
    FileType("f16", 1, "f16"),
    FileType("bf16", 32, "bf16"),
    FileType("q8_0", 7, "q8_0"),
    FileType("q6_k", 18, "q6_k"),
    FileType("q5_1", 9, "q5_1"),
    FileType("q5_0", 8, "q5_0"),
    FileType("q5_k_m", 17, "q5_k"),
    FileType("q5_k_s", 16, "q5_k"),
    FileType("q4_1", 3, "q4_1"),
    FileType("q4_0", 2, "q4_0"),
    FileType("q4_k_m", 15, "q4_k"),
    FileType("q4_k_s", 14, "q4_k"),
    FileType("q3_k_l", 13, "q3_k"),
    FileType("q3_k_m", 12, "q3_k"),
    FileType("q3_k_s", 11, "q3_k"),
    FileType("q2_k", 10, "q2_k"),
    FileType("q2_k_s", 21, "q2_k"),
)
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_BY_NAME = {row.name: row for row in _ROWS}

FILE_TYPES: dict[str, FileType] = _BY_NAME | {a: _BY_NAME[name] for a, name in _ALIASES.items()}
"""llama-quantize's name in lower case → file type; aliases included."""

INT_WORDS = {"int8": "q8_0", "int4": "q4_k_m"}
"""`--int8` and `--int4` → the best file type of so many bits."""


def find_type(name: str) -> GgmlType:
    """Returns the tensor type that a user names, in any case; RequestError for an unknown one."""
    return _find(TYPES, name, "tensor type")


def find_file_type(name: str) -> FileType:
    """Returns the file type that a user names, in any case; RequestError for an unknown one."""
    return _find(FILE_TYPES, name, "type")


def _find(table: dict[str, _Row], name: str, what: str) -> _Row:
    if name.lower() not in table:
        raise RequestError(f"unknown {what} {name!r}; expected one of {', '.join(table)}")
    return table[name.lower()]
