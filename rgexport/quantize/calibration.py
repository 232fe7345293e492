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
from rgexport.quantize.calibration_format import (
    EMBEDDED,
    FISHER,
    FORMAT_VERSION,
    FREQUENCY,
    HELD_OUT,
    HELD_OUT_LENGTHS,
    LENGTHS,
    MAX_BLOCK,
    METADATA,
    PROBABILITY,
    TOKENS,
    Provenance,
    diagonal,
    gradient_name,
    hessian_name,
    is_linear,
    provenance_from,
    triangle_size,
    triangle_width,
    unpack,
)

_MOST = {"I32": 1 << 26, "F32": triangle_size(MAX_BLOCK)}
"""Elements of an array that is read: of a text, and of a block's triangle."""
_FOREIGN = 0.1
"""Of other text's tokens, those of which the calibration says nothing."""
_DTYPES = {"I32": np.dtype(np.int32), "F32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Calibration:
    """An open calibration file. Matrices are read when they are asked for."""

    path: Path
    provenance: Provenance
    _entries: Mapping[str, Entry]

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return self.provenance.tokens

    def require_for(self, hashes: Iterable[str]) -> None:
        """Refuses statistics of another model, by the SHA-256 of its weight files.

        Raises:
            RequestError: they are of another model.
        """
        if set(hashes) != set(self.provenance.files.values()):
            raise RequestError(
                f"{self.path} was made from other weights ({self.provenance.model}) than those of "
                "this model; make one of this model: rgexport calibrate"
            )

    def hessian(self, tensor: str) -> list[np.ndarray] | None:
        """Σ x xᵀ / N of a linear's inputs, float32: the diagonal blocks, each [k, k].

        The blocks cover the columns in their order. For the embedding it is the input of the head.
        None if the tensor has none.

        Raises:
            RequestError: the file is damaged.
        """
        found = [unpack(*triangle) for triangle in self._triangles(tensor)]
        return found or None

    def importance(self, tensor: str) -> np.ndarray | None:
        """The mean square of each input of a linear, float32 [columns]: the Hessian's diagonal."""
        found = [diagonal(*triangle) for triangle in self._triangles(tensor)]
        return np.concatenate(found) if found else None

    def output_sensitivity(self, tensor: str) -> np.ndarray | None:
        """The mean g² of each output of a linear, float32 [rows].

        g is the gradient of a token's summed negative log-likelihood. For the embedding it is
        `row_fisher`, its expected value for each logit before the soft cap. None if the tensor has
        none.
        """
        if tensor == EMBEDDING:
            return self.row_fisher
        name = gradient_name(site_of(tensor)) if is_linear(tensor) else ""
        return self._vector(name) if name in self._entries else None

    def sensitivity(self, tensor: str) -> float | None:
        """The mean of `output_sensitivity`: ½ of it times tr(ΔW H ΔWᵀ) predicts the KL."""
        found = self.output_sensitivity(tensor)
        return None if found is None else float(found.mean(dtype=np.float64))

    @cached_property
    def row_probability(self) -> np.ndarray:
        """The mean probability of each token, float32 [vocab]."""
        return self._vector(PROBABILITY)

    @cached_property
    def row_fisher(self) -> np.ndarray:
        """The mean of p (1 - p) c² of each token, float32 [vocab]; c is the cap's derivative."""
        return self._vector(FISHER)

    @cached_property
    def token_frequency(self) -> np.ndarray:
        """The share of the text that each token has, float32 [vocab]."""
        return self._vector(FREQUENCY)

    @cached_property
    def token_share(self) -> np.ndarray:
        """The share of each token that is expected in other text, float32 [vocab].

        The model's own probabilities, and for what it would not write the same for all tokens.
        """
        return _in_other_text(self.row_probability)

    @cached_property
    def row_sensitivity(self) -> np.ndarray:
        """`row_fisher` as it is expected in other text, float32 [vocab]."""
        return _in_other_text(self.row_fisher)

    @cached_property
    def lookup_sensitivity(self) -> np.ndarray:
        """The mean g² of each channel of the embedding's scaled output, float32 [width]."""
        return self._vector(gradient_name(EMBEDDED))

    @cached_property
    def sequences(self) -> list[np.ndarray]:
        """The text, int32: sequences that were taken each from a fresh state."""
        found = self._sequences(TOKENS, LENGTHS)
        if sum(map(len, found)) != self.tokens:
            raise self._damaged("its text does not fit its header")
        return found

    @cached_property
    def held_out(self) -> list[np.ndarray]:
        """Sequences like those of the text, which no statistic has seen; there may be none."""
        return self._sequences(HELD_OUT, HELD_OUT_LENGTHS) if HELD_OUT in self._entries else []

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
        found: list[tuple[np.ndarray, int]] = []
        while site and (name := hessian_name(site, len(found))) in self._entries:
            packed = self._vector(name, negative=True)
            width = triangle_width(len(packed))
            if width is None or diagonal(packed, width).min() < 0:
                raise self._damaged(f"{name} is no triangle of a Hessian")
            found.append((packed, width))
        return found

    def _vector(self, name: str, *, negative: bool = False) -> np.ndarray:
        """Float values, which must be finite, and not negative unless they may be."""
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
    """Opens a calibration file; checks its header and all that is small.

    Raises:
        RequestError: no such file, another kind of file, another version of the format, or damage.
    """
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise RequestError(f"cannot read the calibration {path}: {what}")
    calibration = Calibration(path, _provenance(path), read_header(path))
    heads = {
        len(calibration.row_probability),
        len(calibration.row_fisher),
        len(calibration.token_frequency),
    }
    if len(heads) > 1:
        raise calibration._damaged("its vectors of the vocabulary differ in length")
    texts = [*calibration.sequences, *calibration.held_out]
    if max(sequence.max() for sequence in texts) >= heads.pop():
        raise calibration._damaged("its text has tokens that are not in the vocabulary")
    for name in calibration._entries:
        if name.endswith(gradient_name("")):
            calibration._vector(name)
    return calibration


def _in_other_text(values: np.ndarray) -> np.ndarray:
    """Values [vocab], a tenth of whose sum is the same for all tokens."""
    return (1 - _FOREIGN) * values + np.float32(_FOREIGN * values.mean(dtype=np.float64))


def is_calibration(path: Path) -> bool:
    """Whether a file says in its metadata that it is a calibration."""
    try:
        return METADATA in read_metadata(path)
    except RequestError:
        return False


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
