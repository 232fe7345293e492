"""The file of statistics that `rgexport calibrate` makes: its format, and its reader.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.kinds import read_typed_metadata
from rgexport.files.safetensors import Entry, has_metadata, read_header
from rgexport.griffin.config import GriffinConfig
from rgexport.griffin.layout import EMBEDDING, input_site, model_tensors, site_of
from rgexport.griffin.tensor import file_rows

METADATA = "rgexport.calibration"
FORMAT_VERSION = 1

MAX_BLOCK = 4096
"""Columns of one Hessian; wider inputs are cut into diagonal blocks."""
_ALIGNMENT = 128  # blocks begin at multiples of this, so that no quantization block is cut

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
    """The source of statistics: a checkpoint and a text.

    `files` and `tokens_sha256` are SHA-256 of the weight files and of the tokens as int32. The
    first `gradient_tokens` have gradients.
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


def pack(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(matrix[np.tri(len(matrix), dtype=bool)])


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """Returns the symmetric matrix [width, width] with this lower triangle."""
    matrix = np.empty((width, width), packed.dtype)
    lower = np.tri(width, dtype=bool)
    matrix[lower] = packed
    matrix.T[lower] = packed
    return matrix


def diagonal(packed: np.ndarray, width: int) -> np.ndarray:
    rows = np.arange(width)
    return np.asarray(packed[rows * (rows + 3) // 2])


_MOST = {"I32": 1 << 26, "F32": triangle_size(MAX_BLOCK)}  # elements of a text, of a triangle
_FOREIGN = 0.1  # share of the tokens of another text on which the calibration gives no information
_DTYPES = {"I32": _INT, "F32": _FLOAT}


@dataclass(frozen=True)
class Calibration:
    """An open calibration file, which raises RequestError where it is damaged.

    Vectors over the vocabulary are float32 [vocab].
    """

    path: Path
    provenance: Provenance
    _entries: Mapping[str, Entry]

    @property
    def tokens(self) -> int:
        return self.provenance.tokens

    def require_for(self, hashes: Iterable[str]) -> None:
        """Refuses statistics of another model, by the SHA-256 of its weight files."""
        if set(hashes) != set(self.provenance.files.values()):
            raise RequestError(
                f"{self.path} was made from other weights ({self.provenance.model}) than those of "
                "this model; make one of this model: rgexport calibrate"
            )

    def hessian(self, tensor: str) -> list[np.ndarray] | None:
        """Returns Σ x xᵀ / N of a linear's or the head's inputs: float32 blocks [k, k].

        The diagonal blocks cover the columns in their order. None if the tensor has none.
        """
        return [unpack(*triangle) for triangle in self._triangles(tensor)] or None

    def importance(self, tensor: str) -> np.ndarray | None:
        """Returns the mean square of each input of a linear, float32 [columns], or None."""
        diagonals = [diagonal(*triangle) for triangle in self._triangles(tensor)]
        return np.concatenate(diagonals) if diagonals else None

    def output_sensitivity(self, tensor: str) -> np.ndarray | None:
        """Returns the mean g² of each output of a linear, float32 [rows], or None.

        g is the gradient of a token's summed negative log-likelihood. For the embedding it is
        `row_fisher`, its expected value for each logit before the soft cap. ½ of its mean times
        tr(ΔW H ΔWᵀ) predicts the KL.
        """
        if tensor == EMBEDDING:
            return self.row_fisher
        name = gradient_name(site_of(tensor)) if input_site(tensor) else ""
        return self._vector(name) if name in self._entries else None

    @cached_property
    def row_probability(self) -> np.ndarray:
        """The mean probability of each token."""
        return self._vector(PROBABILITY)

    @cached_property
    def row_fisher(self) -> np.ndarray:
        """The mean of p (1 - p) c² of each token; c is the soft cap's derivative."""
        return self._vector(FISHER)

    @cached_property
    def token_frequency(self) -> np.ndarray:
        """The share of each token in the text."""
        return self._vector(FREQUENCY)

    @cached_property
    def token_share(self) -> np.ndarray:
        """The expected share of each token in another text: by the model's own probabilities."""
        return _in_other_text(self.row_probability)

    @cached_property
    def row_sensitivity(self) -> np.ndarray:
        """`row_fisher` as expected in another text."""
        return _in_other_text(self.row_fisher)

    @cached_property
    def lookup_sensitivity(self) -> np.ndarray:
        """The mean g² of each channel of the embedding's scaled output, float32 [width]."""
        return self._vector(gradient_name(EMBEDDED))

    @cached_property
    def sequences(self) -> list[np.ndarray]:
        """The text, int32: sequences that each begin in a fresh state."""
        sequences = self._sequences(TOKENS, LENGTHS)
        if sum(map(len, sequences)) != self.tokens:
            raise self._damaged("its text does not fit its header")
        return sequences

    @cached_property
    def held_out(self) -> list[np.ndarray]:
        """Sequences of the same source that are in no statistic; may be empty."""
        return self._sequences(HELD_OUT, HELD_OUT_LENGTHS) if HELD_OUT in self._entries else []

    def _sequences(self, tokens_name: str, lengths_name: str) -> list[np.ndarray]:
        tokens, lengths = self._read(tokens_name, "I32"), self._read(lengths_name, "I32")
        if tokens.min() < 0 or lengths.min() < 1 or lengths.sum(dtype=np.int64) != len(tokens):
            raise self._damaged(f"{tokens_name} and {lengths_name} are no sequences of tokens")
        return np.split(tokens, np.cumsum(lengths)[:-1])

    def _triangles(self, tensor: str) -> list[tuple[np.ndarray, int]]:
        """The packed triangle and the width of each block; none if the tensor has no Hessian."""
        site = input_site(tensor)
        triangles: list[tuple[np.ndarray, int]] = []
        while site and (name := hessian_name(site, len(triangles))) in self._entries:
            packed = self._vector(name, negative=True)
            width = (math.isqrt(8 * len(packed) + 1) - 1) // 2
            if triangle_size(width) != len(packed) or diagonal(packed, width).min() < 0:
                raise self._damaged(f"{name} is no triangle of a Hessian")
            triangles.append((packed, width))
        return triangles

    def _vector(self, name: str, *, negative: bool = False) -> np.ndarray:
        """Values that must be finite, and not negative unless they may be."""
        values = self._read(name, "F32")
        if not np.isfinite(values).all() or (values.min() < 0 and not negative):
            raise self._damaged(f"{name} has NaN, infinite or negative values")
        return values

    def _read(self, name: str, dtype: str) -> np.ndarray:
        entry = self._entries.get(name)
        if entry is None:
            raise self._damaged(f"it has no {name}")
        if entry.dtype != dtype or len(entry.shape) != 1 or not 0 < entry.shape[0] <= _MOST[dtype]:
            raise self._damaged(
                f"{name} is {entry.dtype} {list(entry.shape)}; expected {dtype} and one axis of at "
                f"most {_MOST[dtype]}"
            )
        return file_rows(self.path, entry.shape, _DTYPES[dtype], entry.offset).whole()

    def _damaged(self, what: str) -> RequestError:
        return RequestError(f"{self.path} is damaged: {what}; make it again: rgexport calibrate")


def open_calibration(path: Path) -> Calibration:
    """Opens a calibration file; checks its header and everything but the Hessians.

    Raises RequestError for a missing file, another kind or version, and damage.
    """
    provenance = read_typed_metadata(path, METADATA, Provenance, FORMAT_VERSION)
    calibration = Calibration(path, provenance, read_header(path))
    vectors = calibration.row_probability, calibration.row_fisher, calibration.token_frequency
    sizes = {*map(len, vectors)}
    if len(sizes) > 1:
        raise calibration._damaged("its vectors of the vocabulary differ in length")
    texts = [*calibration.sequences, *calibration.held_out]
    if max(sequence.max() for sequence in texts) >= sizes.pop():
        raise calibration._damaged("its text has tokens that are not in the vocabulary")
    for name in calibration._entries:
        if name.endswith(gradient_name("")):
            calibration._vector(name)
    return calibration


is_calibration = partial(has_metadata, METADATA)


def _in_other_text(values: np.ndarray) -> np.ndarray:
    """Values [vocab]; a tenth of their sum is spread evenly over all tokens."""
    return (1 - _FOREIGN) * values + np.float32(_FOREIGN * values.mean(dtype=np.float64))
