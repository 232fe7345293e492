"""Reads an importance matrix of llama-imatrix: the mean square of every tensor's input columns.

The file is a GGUF with `NAME.in_sum2` (sums of squares) and `NAME.counts` (tokens). Llama.cpp's
older format has no files of this model, which our llama.cpp alone runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgexport.errors import RequestError
from rgexport.files.paths import report_os_errors, require_regular
from rgexport.griffin.tensor import file_rows
from rgexport.quantize.gguf_header import GgufHeader, is_gguf, read_header

MAX_BYTES = 1 << 30
"""Far above what the widest model needs (2B: 3 MB)."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS = "imatrix.datasets", "imatrix.chunk_count"
_FLOAT = np.dtype("<f4")
_METADATA_BYTES = 127  # the most that llama-quantize copies of a string into the metadata


@dataclass(frozen=True)
class Imatrix:
    """Importances by ggml tensor name, float32 [columns]; `chunks` of the text, 0 if unknown."""

    path: Path
    entries: dict[str, np.ndarray]
    dataset: str | None
    chunks: int

    def importance(self, name: str, columns: int) -> np.ndarray | None:
        """Returns float32 [columns] or None; RequestError for another number of columns."""
        entry = self.entries.get(name)
        if entry is None or len(entry) == columns:
            return entry
        raise RequestError(
            f"{self.path} has {len(entry)} importances for {name}, which has {columns} columns: "
            "it was made for another model"
        )

    def require_any_of(self, names: Iterable[str]) -> None:
        """Raises RequestError for a matrix of another model, which has none of the tensors."""
        if self.entries.keys().isdisjoint(names):
            raise RequestError(
                f"{self.path} has no tensor of this model (its first is {min(self.entries)}); "
                "make one with llama-imatrix from this model's f32 or f16 GGUF"
            )

    def metadata(self) -> dict[str, str | int]:
        """Returns the keys `quantize.imatrix.*` that llama-quantize writes, in its order."""

        def shorten(text: str) -> str:
            return text.encode(errors="replace")[:_METADATA_BYTES].decode(errors="ignore")

        values: dict[str, str | int] = {"quantize.imatrix.file": shorten(str(self.path))}
        if self.dataset is not None:
            values["quantize.imatrix.dataset"] = shorten(self.dataset)
        values["quantize.imatrix.entries_count"] = len(self.entries)
        return values | ({"quantize.imatrix.chunks_count": self.chunks} if self.chunks > 0 else {})


def read_imatrix(path: Path) -> Imatrix:
    """Reads a file; RequestError for anything else, or damage."""
    with report_os_errors(path):
        size = require_regular(path)
        if size > MAX_BYTES or not is_gguf(path):
            raise _not_one(
                path, f"it has {size} bytes" if size > MAX_BYTES else "it is no GGUF file"
            )
        imatrix = _from_gguf(read_header(path))
    for name, values in imatrix.entries.items():
        if not (np.isfinite(values) & (values >= 0)).all():
            raise RequestError(f"{path} is damaged: {name} has importances that are no squares")
    return imatrix


def _not_one(path: Path, why: str) -> RequestError:
    return RequestError(f"{path} is not an importance matrix of llama-imatrix: {why}")


def _from_gguf(header: GgufHeader) -> Imatrix:
    path, values = header.path, header.values
    datasets, chunks = values.get(_DATASETS), values.get(_CHUNKS)
    names = [key.removesuffix(_SUMS) for key in header.tensors if key.endswith(_SUMS)]
    if not isinstance(datasets, list) or type(chunks) is not int or not names:
        raise _not_one(path, f"expected {_DATASETS}, {_CHUNKS} and tensors NAME{_SUMS}")
    entries = {name: _mean_squares(header, name) for name in names}
    return Imatrix(path, entries, datasets[0] if datasets else None, chunks)


def _mean_squares(header: GgufHeader, name: str) -> np.ndarray:
    """Sums divided by counts, one count for each matrix of the tensor; 1 where a count is 0."""
    sums, counts = (_floats(header, name + suffix) for suffix in (_SUMS, _COUNTS))
    if len(sums) % len(counts) or not np.isfinite(counts).all():
        raise RequestError(
            f"{header.path} is damaged: {name} has {len(counts)} counts for {len(sums)} sums"
        )
    counts = np.rint(counts)[:, None]
    with np.errstate(all="ignore"):
        means = np.where(counts > 0, sums.reshape(len(counts), -1) / counts, _FLOAT.type(1))
    return means.reshape(-1)


def _floats(header: GgufHeader, name: str) -> np.ndarray:
    tensor = header.tensors.get(name)
    if tensor is None or tensor.type.name != "f32":
        kind = "missing" if tensor is None else tensor.type.name
        raise RequestError(f"{header.path} is damaged: {name} is {kind}; expected f32")
    return file_rows(header.path, tensor.shape, _FLOAT, tensor.offset).whole().reshape(-1)
