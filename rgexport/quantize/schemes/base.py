"""The interface of storage schemes.

A scheme describes how the rows of a tensor are stored: the arrays (parts) that hold them, and the
algorithm that chooses their levels. Each is a frozen dataclass and a row of `scheme.SCHEMES`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from math import prod
from typing import Any, ClassVar, Literal, Self

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.typed_json import Mismatch, from_json, to_json
from rgexport.quantize.algorithms.registry import ALGORITHMS
from rgexport.quantize.algorithms.statistics import Known, RemoteStatistics, RowKinds
from rgexport.quantize.schemes.steps import Measure, StepSizes, span_steps

FloatDtype = Literal["float32", "float16"]
Shape = tuple[int, ...]
Parts = dict[str, np.ndarray]
"""Part name → its rows."""
PartShapes = dict[str, tuple[str, Shape]]
"""Part name → dtype and shape."""
Encoder = Callable[[Any, np.ndarray, Any], Parts]
"""Scheme, rows [n, K] of any float dtype, and `Statistics` or None → parts."""
_ALGORITHM = re.compile("[a-z0-9_-]{1,32}")


def nbytes_of(shapes: PartShapes) -> int:
    return sum(prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes.values())


class Scheme(ABC):
    """The layout of a tensor."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The key of `scheme.SCHEMES`."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A short name for people, such as `int4/32`."""

    @property
    @abstractmethod
    def uniform(self) -> "tuple[Uniform, ...]":
        """The scheme itself, or the schemes of the row groups."""

    @abstractmethod
    def row_groups(self, rows: int) -> "list[tuple[str, Uniform, np.ndarray | None]]":
        """Returns label, scheme and row numbers (ascending, None for all) of each row group.

        Raises RequestError where the groups do not fit a tensor of so many rows.
        """

    @classmethod
    @abstractmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads a `to_dict`; RequestError for an unknown field or value."""

    def to_dict(self) -> dict[str, Any]:
        return dict(to_json(self))

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored as integers or indices, not as floats."""
        return True

    @property
    def is_float_array(self) -> bool:
        """Whether weights are stored as an array of floats, not in parts or packed bytes."""
        return False

    @property
    def is_gguf_only(self) -> bool:
        """Whether only GGUF files can store weights in this scheme."""
        return False

    @property
    def has_matmul_nbits_layout(self) -> bool:
        """Whether its parts have the layout of ONNX Runtime's `MatMulNBits`."""
        return False

    @property
    def has_row_groups(self) -> bool:
        """Whether rows are stored in several groups, each in a scheme of its own."""
        return False

    @property
    def rows_together(self) -> int:
        """Rows that share stored data, such as a palette, and are encoded together."""
        return 1

    @property
    def ggml_type(self) -> str | None:
        """The equivalent type of a GGUF file, or None."""
        return None

    @property
    def needs_statistics(self) -> bool:
        rows = (ALGORITHMS.get(scheme.algorithm) for scheme in self.uniform)
        return any(row is not None and row.needs_statistics for row in rows)

    def require_known_algorithm(self) -> None:
        """Raises RequestError for algorithms that are unknown or for other schemes."""
        for scheme in self.uniform:
            if scheme.algorithm not in scheme.encoders:
                raise RequestError(
                    f"algorithm is {scheme.algorithm!r}; expected {', '.join(scheme.encoders)}"
                )

    def group_sizes(self, rows: int) -> tuple[int, ...]:
        """Returns the rows of each group; RequestError where groups do not fit so many `rows`."""
        return (rows,)

    def positions(self, rows: int) -> np.ndarray | None:
        """Returns the position of each row among the groups' rows, int32 [rows].

        Returns None if rows are stored in their own order.
        """
        return None

    def index_bytes(self, rows: int) -> int:
        """Returns the bytes that lists of the groups' rows take in a manifest and a graph."""
        return 0

    def fitted(self, shape: Shape) -> "Scheme":
        """Returns the closest scheme that stores a matrix [N, K] without padding, for Core ML.

        Blocks divide a row, groups the rows, and odd rows are stored in 8 bits, as 4 bits need
        pairs.
        """
        return self

    def least_padded(self, columns: int) -> "Scheme":
        """Returns the scheme with the block, up to its own, that takes the fewest bytes a row."""
        return self

    def with_dtype(self, dtype: FloatDtype) -> "Scheme":
        return self

    def with_blocks(self, block: int | None, symmetric: bool | None) -> "Scheme":
        """Returns the scheme with a user's block size and symmetry, where it has those.

        None leaves them as they are.
        """
        return self

    @abstractmethod
    def with_algorithm(self, algorithm: str) -> Self:
        """Returns the scheme filled by another algorithm; unchanged where that does not apply."""


class Uniform(Scheme):
    """A scheme that all rows of a tensor, or of a row group, share."""

    encoders: ClassVar[Mapping[str, Encoder]]

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """The key of `ALGORITHMS` that chose the levels; not part of the layout."""

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Bits of storage per weight, with scales and zero points of blocks."""

    @abstractmethod
    def part_shapes(self, shape: Shape) -> PartShapes: ...

    @abstractmethod
    def decode(self, arrays: Parts, columns: int) -> np.ndarray:
        """Returns rows float32 [n, columns] from the same rows of all parts."""

    @abstractmethod
    def weight_steps(self, w: np.ndarray) -> StepSizes:
        """Returns the distance of stored values at the original weights `w` [rows, columns]."""

    def stored_steps(self, dequantized: np.ndarray) -> StepSizes:
        """Returns the distance of stored values at dequantized weights, from these alone."""
        return self.weight_steps(dequantized)

    @property
    def level_bits(self) -> int | None:
        """Bits of a level or index; None for floats and ggml's types."""
        return getattr(self, "bits", None)

    @property
    def has_block_options(self) -> bool:
        """Whether users can choose its block size and symmetry."""
        return False

    @property
    def symmetric_bits(self) -> int | None:
        """Bits of levels around the fixed zero point 2**(bits - 1); None for other levels."""
        return None

    @property
    def scale_dtype(self) -> FloatDtype | None:
        """The dtype of its scales, one float for each block; None without such scales."""
        return None

    @property
    def largest_multiple(self) -> int:
        """The largest multiple of a scale that a weight can be; 1 without such scales."""
        return 1

    @property
    def has_onnx_op(self) -> bool:
        """Whether ops of ONNX Runtime, or functions made of them, compute with its parts."""
        return False

    @property
    def needs_local_function(self) -> bool:
        """Whether an ONNX graph computes with it by a function of its own, of several ops."""
        return False

    def unpacked_bytes(self, shape: Shape) -> int:
        """Returns the bytes of a matrix's levels that stock ONNX ops unpack before they use them.

        Returns 0 if they use the levels as they are stored.
        """
        return 0

    def pads_zero_points(self, columns: int) -> bool:
        """Whether the packed zero points of a row of so many weights end within a byte."""
        return False

    @property
    def has_mil_op(self) -> bool:
        """Whether a constexpr op of MIL, Core ML's language, dequantizes its parts."""
        return False

    @property
    def precision(self) -> str:
        """The word of `--precision` or `--type` for such weights."""
        return self.label.partition("/")[0]

    @property
    def storage_class(self) -> str:
        """The class of precision that tolerances are given for: `int4`, `float16`."""
        return f"int{self.level_bits}"

    @property
    def rounds_activations(self) -> bool:
        """Whether kernels may round activations to int8 in products with such weights."""
        return False

    @property
    def extra_graph_bytes(self) -> int:
        """Bytes of a matrix or row group in a graph and its manifest, beyond other schemes' bytes.

        An estimate, which `rgexport quantize` adds to the size of the weights.
        """
        return 0

    def rounding_rule(self, weighted: bool) -> str:
        """Returns a key of `weights.expectations.EXPECTATIONS`; `weighted` by importances."""
        return self.algorithm

    @property
    def uniform(self) -> "tuple[Uniform, ...]":
        return (self,)

    def row_groups(self, rows: int) -> "list[tuple[str, Uniform, np.ndarray | None]]":
        return [(self.label, self, None)]

    def fitted(self, shape: Shape) -> "Uniform":
        return self

    def with_algorithm(self, algorithm: str) -> Self:
        if not self.is_quantized or algorithm not in self.encoders:
            return self
        return replace(self, algorithm=algorithm)  # type: ignore[type-var]

    def step_sizes(self, w: np.ndarray, measure: Measure = "weight") -> StepSizes:
        """Returns the units of the errors of the original weights `w` [rows, columns].

        Rows are whole groups of `rows_together`. `measure` says which errors are bounded.
        """
        return self._span_steps(w, measure) if measure in ("block", "row") else self.weight_steps(w)

    def _span_steps(self, w: np.ndarray, measure: Measure) -> StepSizes:
        levels = self.weight_steps(w).levels
        error = np.broadcast_to(levels * 12**-0.5, w.shape)
        return span_steps(error, np.zeros((1, 1)), np.zeros(1, np.intp), levels)

    def encode(
        self, name: str, rows: np.ndarray, statistics: Known = None, ids: np.ndarray | None = None
    ) -> Parts:
        """Returns the parts of rows [n, K], any float dtype, with levels chosen by the algorithm.

        `name` is the tensor, for messages; `statistics` are about its inputs; `ids` are the numbers
        of the rows, where statistics have kinds of rows. Raises RequestError for a weight that the
        scheme cannot hold, and missing statistics.
        """
        if isinstance(statistics, RemoteStatistics):
            if self.is_quantized:
                return statistics.encode(name, rows, self, ids)
            statistics = None
        weighed = self.needs_statistics
        try:
            if weighed and (statistics is None or not statistics.hessians):
                needed = "needs statistics of its inputs; give --calibration FILE"
                raise RequestError(f"{self.algorithm} {needed}")
            if weighed and statistics and statistics.kinds and ids is not None:
                return self._encode_kinds(rows, statistics.kinds, ids)
            return self.encoders[self.algorithm](self, rows, statistics)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from None

    def round_trip(
        self, name: str, rows: np.ndarray, statistics: Known, ids: np.ndarray
    ) -> np.ndarray:
        """Returns rows [n, K] float32 as they are read back after `encode`."""
        return self.decode(self.encode(name, rows, statistics, ids), rows.shape[1])

    def _encode_kinds(self, rows: np.ndarray, kinds: RowKinds, ids: np.ndarray) -> Parts:
        """Encodes rows of each kind by its statistics; rows of one palette share the last kind."""
        together = self.rows_together
        kind_of_row = kinds.kind[ids].reshape(-1, together).max(1).repeat(together)
        arrays: Parts = {}
        for kind in np.unique(kind_of_row):
            chosen = np.flatnonzero(kind_of_row == kind)
            encoded = self.encoders[self.algorithm](self, rows[chosen], kinds.statistics[kind])
            for label, array in encoded.items():
                share = len(chosen) // len(array)  # weight rows for each row of the part
                whole = arrays.setdefault(
                    label, np.empty((len(rows) // share, *array.shape[1:]), array.dtype)
                )
                whole[chosen[::share] // share] = array
        return arrays

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in names:
                raise RequestError(
                    f"a scheme of kind {cls.kind} has {key}; expected {', '.join(names)}"
                )
        if not _ALGORITHM.fullmatch(str(values.get("algorithm", cls.algorithm))):
            raise RequestError(f"a scheme has algorithm = {values['algorithm']!r}; expected a word")
        try:
            return from_json(cls, values)
        except Mismatch as error:
            raise RequestError(f"a scheme of kind {cls.kind}: {error}") from None
