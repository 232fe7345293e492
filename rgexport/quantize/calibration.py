"""Reads the statistics that `rgexport calibrate` made, for the algorithms that use them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.safetensors import Entry, read_header, read_metadata
from rgexport.files.typed_json import parse_json
from rgexport.griffin.layout import EMBEDDING, input_site, site_of
from rgexport.griffin.tensor import file_rows
from rgexport.quantize import calibration_format as names
from rgexport.quantize.calibration_format import (
    FORMAT_VERSION,
    MAX_BLOCK,
    METADATA,
    Provenance,
    diagonal,
    gradient_name,
    hessian_name,
    provenance_from,
    triangle_size,
    triangle_width,
    unpack,
)

_MOST = {"I32": 1 << 26, "F32": triangle_size(MAX_BLOCK)}
"""Most elements of an array: of a text, and of a block's triangle."""
_FOREIGN = 0.1
"""Share of the tokens of another text on which the calibration gives no information."""
_DTYPES = {"I32": np.dtype(np.int32), "F32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Calibration:
    """An open calibration file; matrices are read on access.

    Vectors over the vocabulary are float32 [vocab]. All methods raise RequestError where the file
    is damaged.
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
        """Returns Σ x xᵀ / N of a linear's inputs, float32: its diagonal blocks [k, k].

        For the embedding it is the input of the head.
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
        return self._vector(names.PROBABILITY)

    @cached_property
    def row_fisher(self) -> np.ndarray:
        """The mean of p (1 - p) c² of each token; c is the soft cap's derivative."""
        return self._vector(names.FISHER)

    @cached_property
    def token_frequency(self) -> np.ndarray:
        """The share of each token in the text."""
        return self._vector(names.FREQUENCY)

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
        return self._vector(gradient_name(names.EMBEDDED))

    @cached_property
    def sequences(self) -> list[np.ndarray]:
        """The text, int32: sequences that each begin in a fresh state."""
        sequences = self._sequences(names.TOKENS, names.LENGTHS)
        if sum(map(len, sequences)) != self.tokens:
            raise self._damaged("its text does not fit its header")
        return sequences

    @cached_property
    def held_out(self) -> list[np.ndarray]:
        """Sequences of the same source that are in no statistic; may be empty."""
        if names.HELD_OUT not in self._entries:
            return []
        return self._sequences(names.HELD_OUT, names.HELD_OUT_LENGTHS)

    def _sequences(self, tokens_name: str, lengths_name: str) -> list[np.ndarray]:
        tokens, lengths = self._read(tokens_name, "I32"), self._read(lengths_name, "I32")
        if tokens.min(initial=0) < 0:
            raise self._damaged(f"{tokens_name} has negative ids")
        if lengths.min(initial=1) < 1 or lengths.sum(dtype=np.int64) != len(tokens):
            raise self._damaged(f"the {lengths_name} of its sequences do not add up")
        return np.split(tokens, np.cumsum(lengths)[:-1])

    def _triangles(self, tensor: str) -> list[tuple[np.ndarray, int]]:
        """The packed triangle and the width of each block; none if the tensor has no Hessian."""
        site = input_site(tensor)
        triangles: list[tuple[np.ndarray, int]] = []
        while site and (name := hessian_name(site, len(triangles))) in self._entries:
            packed = self._vector(name, negative=True)
            width = triangle_width(len(packed))
            if width is None or diagonal(packed, width).min() < 0:
                raise self._damaged(f"{name} is no triangle of a Hessian")
            triangles.append((packed, width))
        return triangles

    def _vector(self, name: str, *, negative: bool = False) -> np.ndarray:
        """Values that must be finite, and not negative unless they may be."""
        values = self._read(name, "F32")
        if not np.isfinite(values).all():
            raise self._damaged(f"{name} has NaN or infinite values")
        if not negative and values.min(initial=0) < 0:
            raise self._damaged(f"{name} has negative values")
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

    Raises:
        RequestError: no such file, another kind of file, another version of the format, or damage.
    """
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise RequestError(f"cannot read the calibration {path}: {what}")
    calibration = Calibration(path, _provenance(path), read_header(path))
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


def is_calibration(path: Path) -> bool:
    try:
        return METADATA in read_metadata(path)
    except RequestError:
        return False


def _in_other_text(values: np.ndarray) -> np.ndarray:
    """Values [vocab]; a tenth of their sum is spread evenly over all tokens."""
    return (1 - _FOREIGN) * values + np.float32(_FOREIGN * values.mean(dtype=np.float64))


def _provenance(path: Path) -> Provenance:
    text = read_metadata(path).get(METADATA)
    if text is None:
        raise RequestError(
            f"{path} is not a calibration; expected a file that `rgexport calibrate` made"
        )
    try:
        fields = parse_json(text.encode())
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            raise RequestError(
                f"{path} has format version {version}; this rgexport reads {FORMAT_VERSION}: "
                + ("update rgexport" if version > FORMAT_VERSION else "make it again")
            )
        return provenance_from(fields)
    except ValueError as error:
        raise RequestError(f"{path} is damaged: {error}") from None
