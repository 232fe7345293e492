"""The format of a calibration file: names, shapes and packing of its arrays.

It is a safetensors file. Its metadata have one JSON object, `Provenance`. Its arrays:

| name | shape | contents |
|---|---|---|
| `tokens`, `lengths` | int32 [N], [S] | the text: S sequences, one after another |
| `held_out.tokens`, `held_out.lengths` | int32 | text that no statistic has seen, if there is any |
| `SITE.hessian.J` | float32 [k(k+1)/2] | a triangle of Σ x xᵀ / N, see below |
| `LINEAR.gradient` | float32 [rows] | mean of g² for each output of a linear |
| `embed_tokens.gradient` | float32 [width] | the same at the embedding's output |
| `lm_head.probability` | float32 [vocab] | mean probability of each token |
| `lm_head.fisher` | float32 [vocab] | mean of p (1 - p) c², c the soft cap's derivative |
| `embed_tokens.frequency` | float32 [vocab] | share of each token in the text |

SITE is the op whose result some linears share as their input x. Its columns are cut into diagonal
blocks; each is stored as its lower triangle, row by row. g is the gradient of the summed negative
log-likelihood, with labels drawn from the model's own distribution.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, input_site, model_tensors, site_of

METADATA = "rgexport.calibration"
FORMAT_VERSION = 1

MAX_BLOCK = 4096
"""Columns of one Hessian; wider inputs are cut into diagonal blocks."""
_ALIGNMENT = 128
"""Blocks begin at multiples of this, so that no quantization block is cut."""

TOKENS, LENGTHS = "tokens", "lengths"
HELD_OUT, HELD_OUT_LENGTHS = "held_out.tokens", "held_out.lengths"
PROBABILITY, FISHER = "lm_head.probability", "lm_head.fisher"
FREQUENCY = "embed_tokens.frequency"
EMBEDDED = "embed_tokens"
"""The site of the lookup."""

Arrays = dict[str, tuple[np.dtype, tuple[int, ...]]]
"""Name → dtype and shape."""
_FLOAT, _INT = np.dtype(np.float32), np.dtype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The source of statistics.

    `files` are the SHA-256 of the checkpoint's weight files, `tokens_sha256` that of the tokens as
    int32. The first `gradient_tokens` have gradients. `text` names the text's source.
    """

    model: str
    files: dict[str, str]
    tokens: int
    gradient_tokens: int
    text: str
    tokens_sha256: str
    seed: int
    tool: str
    format_version: int = FORMAT_VERSION

    def as_metadata(self) -> dict[str, str]:
        return {METADATA: json.dumps(dataclasses.asdict(self), sort_keys=True)}


def provenance_from(fields: Any) -> Provenance:
    """Reads the parsed JSON that `Provenance.as_metadata` wrote; ValueError for anything else."""
    kinds = {field.name: field.type for field in dataclasses.fields(Provenance)}
    fields = fields if isinstance(fields, dict) else {}
    for name, kind in kinds.items():
        if type(fields.get(name)) is not (typing.get_origin(kind) or kind):
            raise ValueError(f"its metadata have no valid {name}")
    if not all(isinstance(sha, str) for sha in fields["files"].values()):
        raise ValueError("its metadata have no valid files")
    return Provenance(**{name: fields[name] for name in kinds})


def hessian_name(site: str, block: int) -> str:
    return f"{site}.hessian.{block}"


def gradient_name(site: str) -> str:
    return f"{site}.gradient"


def column_blocks(columns: int) -> list[tuple[int, int]]:
    """Returns first and last column (exclusive) of each diagonal block, of nearly equal sizes."""
    count = -(-columns // MAX_BLOCK)
    step = columns if count == 1 else -(-columns // (count * _ALIGNMENT)) * _ALIGNMENT
    return [(start, min(start + step, columns)) for start in range(0, columns, step)]


def linears(config: GriffinConfig) -> dict[str, tuple[int, ...]]:
    return {n: spec.shape for n, spec in model_tensors(config).items() if spec.role == "linear"}


def input_columns(config: GriffinConfig) -> dict[str, int]:
    """Returns site → columns of its output, for the inputs of linears and of the head."""
    columns = {str(input_site(name)): shape[1] for name, shape in linears(config).items()}
    return columns | {str(input_site(EMBEDDING)): config.width}


def arrays_of(config: GriffinConfig, texts: Mapping[str, np.ndarray]) -> Arrays:
    """Returns all arrays of a file, in their order; `texts` holds its tokens and lengths."""
    floats: dict[str, int] = dict.fromkeys((PROBABILITY, FISHER, FREQUENCY), config.vocab_size)
    floats[gradient_name(EMBEDDED)] = config.width
    for name, shape in linears(config).items():
        floats[gradient_name(site_of(name))] = shape[0]
    for site, columns in input_columns(config).items():
        for block, (start, stop) in enumerate(column_blocks(columns)):
            floats[hessian_name(site, block)] = triangle_size(stop - start)
    arrays: Arrays = {name: (_INT, array.shape) for name, array in texts.items()}
    return arrays | {name: (_FLOAT, (size,)) for name, size in floats.items()}


def triangle_size(width: int) -> int:
    return width * (width + 1) // 2


def triangle_width(size: int) -> int | None:
    """Returns the width of a matrix from the size of its lower triangle, or None."""
    width = (math.isqrt(8 * size + 1) - 1) // 2
    return width if width > 0 and triangle_size(width) == size else None


def pack(matrix: np.ndarray) -> np.ndarray:
    """Returns the lower triangle of [k, k], row by row."""
    packed: np.ndarray = matrix[np.tri(len(matrix), dtype=bool)]
    return packed


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """Returns the symmetric matrix [width, width] with this lower triangle."""
    matrix = np.empty((width, width), packed.dtype)
    lower = np.tri(width, dtype=bool)
    matrix[lower] = packed
    matrix.T[lower] = packed
    return matrix


def diagonal(packed: np.ndarray, width: int) -> np.ndarray:
    """Returns the diagonal of the matrix with this lower triangle."""
    rows = np.arange(width)
    values: np.ndarray = packed[rows * (rows + 3) // 2]
    return values
