"""The ggml tensor types that are written, as data (ggml.h, ggml-common.h)."""

from dataclasses import dataclass

from rgexport.errors import RequestError


@dataclass(frozen=True)
class GgmlType:
    """One way in which ggml stores a row: blocks of `block` weights in `block_bytes` bytes."""

    name: str
    value: int
    """The number of `enum ggml_type`, as a GGUF file has it."""
    block: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, scales included."""
        return self.block_bytes * 8 / self.block

    @property
    def is_quantized(self) -> bool:
        """Whether weights share a scale."""
        return self.block > 1

    def fits(self, columns: int) -> bool:
        """Whether a row of `columns` weights is a whole number of blocks."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights.

        Raises:
            ValueError: the row is not a whole number of blocks.
        """
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
"""The number in a file → type."""


def find_type(word: str) -> GgmlType:
    """The tensor type that a user names, in any case.

    Raises:
        RequestError: an unknown type.
    """
    try:
        return TYPES[word.lower()]
    except KeyError:
        raise RequestError(
            f"unknown tensor type {word!r}; expected one of {', '.join(TYPES)}"
        ) from None
